"""What every part of the fleet agrees on."""
