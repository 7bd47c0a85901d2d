//! Failing storages.
