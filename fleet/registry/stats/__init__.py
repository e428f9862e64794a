"""Statistics: reports stored, aggregated, rolled up and queried."""
