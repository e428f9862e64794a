"""Enrolment of devices: the certificate authority and the HTTPS service."""
