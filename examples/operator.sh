#!/bin/sh
# An operator's session. The fleet is up ('fleet up'), and its device kitchen runs ('edge-agent run kitchen').
set -eux

fleet devices                               # who is there
fleet tag kitchen floor=1 wing=east         # words of one's own for devices
fleet devices --tag floor=1

fleet enroll tablet --role app --out tablet # an app that may ask nobody yet
fleet allow tablet floor=1                  # now all devices of the first floor, later ones too

fleet prompt kitchen "How warm is it?" --max-new-tokens 8
fleet stats kitchen --since 1h              # where its tokens came from
fleet sessions kitchen --limit 3            # and which worker helped

fleet disallow tablet floor=1               # within two seconds
fleet tag kitchen --remove wing
