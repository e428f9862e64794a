"""Identities: their life cycle, certificates, enrolment tokens and rights."""
