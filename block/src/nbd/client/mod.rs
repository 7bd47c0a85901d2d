//! A client of an NBD server: one export over one connection, which is made again
//! when it is lost.
//!
//! - `connect`: addresses and sockets; `socket`: bytes;
//! - `handshake`: what is agreed on; `transmission`: requests and replies;
//! - `queue`: from submitting threads to the connection's; `link`: connections one
//!   after another.
//!
//! What does not live here: the node (`crate::drivers::nbd`), which splits and
//! aligns requests.

mod connect;
mod error;
mod handshake;
mod link;
mod queue;
mod received;
mod socket;
#[cfg(all(test, not(shuttle)))]
pub(crate) mod test_server;
#[cfg(all(test, not(shuttle)))]
mod tests;
mod transmission;

pub use error::NbdError;
pub(crate) use handshake::Export;
pub(crate) use link::Client;
pub(crate) use queue::{Command, Status};
