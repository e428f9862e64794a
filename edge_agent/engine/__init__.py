"""The caches of answers, the locks, the speed and the tokenizer of a device."""
