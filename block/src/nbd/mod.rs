//! The Network Block Device protocol.
//!
//! - [`protocol`]: what is on the wire, for both sides; no I/O.
//!
//! What does not live here: the client, which is a driver (`crate::drivers`).

pub mod protocol;
