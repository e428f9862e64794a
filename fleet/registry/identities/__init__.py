"""Identities: enrolment, certificates, lifecycle and grants."""
