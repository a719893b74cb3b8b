"""Side by side with what people would use instead: each in its own process, peers in their own environments."""
