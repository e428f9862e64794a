"""Who belongs to the fleet: its certificate authority, and the identities that it makes."""
