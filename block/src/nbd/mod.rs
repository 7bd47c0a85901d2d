//! The Network Block Device protocol.
//!
//! - [`protocol`]: what is on the wire, for both sides; no I/O;
//! - `client`: one export of a server, for the driver (`crate::drivers::nbd`);
//! - `server`: serves exports to clients.

pub(crate) mod client;
pub mod protocol;
pub(crate) mod server;
