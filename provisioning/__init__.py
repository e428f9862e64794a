"""Enrolment: the certificate authority and the HTTPS service."""
