//! What requests do, and what goes wrong with them.
