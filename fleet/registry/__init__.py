"""What the fleet knows and has counted: identities, devices, sessions, generations, tokens by source."""
