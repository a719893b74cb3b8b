"""`loquetier demo`: three adapters answer while a fourth is trained, live, on one base."""
