"""Identity folders, enrolment requests and the rotation of certificates."""
