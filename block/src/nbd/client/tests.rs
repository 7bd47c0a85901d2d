//! The client against servers that follow a script, and others that misbehave.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use super::socket::Socket;
use crate::runtime::{AsyncFd, EventLoop};

mod handshake;
mod link;
mod transmission;

/// Runs `client` on one end of a connection, and `server`, which may block, on the
/// other; gives what the client gives.
fn with_server<F, T>(
    server: impl FnOnce(UnixStream) + Send + 'static,
    client: impl FnOnce(Socket) -> F,
) -> T
where
    F: Future<Output = T>,
{
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let server: JoinHandle<()> = std::thread::spawn(move || server(theirs));
    let event_loop = EventLoop::new("test").unwrap();
    let result = event_loop.block_on(async {
        let socket = Socket::new(AsyncFd::new(OwnedFd::from(ours)).unwrap());
        client(socket).await
    });
    server.join().unwrap();
    result
}
