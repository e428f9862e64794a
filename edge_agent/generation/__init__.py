"""Token generation: exits, speculative decoding and the choice of mode."""
