"""What exits are worth: records of what they said, thresholds that keep a promise, and how sure that is."""
