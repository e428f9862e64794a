#!/bin/sh
# An operator's session. The fleet is up ('fleet up'), and its device kitchen runs
# ('edge-agent run kitchen').
set -eux

fleet devices                               # the devices and their states
fleet tag kitchen floor=1 wing=east         # tags of your own for devices
fleet devices --tag floor=1

fleet enroll tablet --role app --out tablet # an app without access to any device
fleet allow tablet floor=1                  # access to all devices of the first floor, later ones too

fleet prompt kitchen "How warm is it?" --max-new-tokens 8
fleet stats kitchen --since 1h              # the sources of its tokens
fleet sessions kitchen --limit 3            # and the worker of each session

fleet disallow tablet floor=1               # takes effect within two seconds
fleet tag kitchen --remove wing
