//! Staged races.
