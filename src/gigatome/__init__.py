"""Learn from gigapixel whole-slide images where they lie."""
