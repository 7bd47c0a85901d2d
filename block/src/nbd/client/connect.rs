//! Where a server is, and how it is reached.
//!
//! What does not live here: what is said to it (`handshake`).

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, socket_with, sockopt,
};

use super::error::NbdError;
use crate::options::{InetAddress, SocketAddress};
use crate::runtime::{AsyncFd, Interest, sleep, unblock};

/// The name of the port that NBD has.
const SERVICE: (&str, u16) = ("nbd", 10809);
/// Wait for a server's queue of connections to have room.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// Connects to `address`. Takes as long as the network does: bound it.
///
/// Cancel: the attempt is given up; a look-up of a name goes on unseen.
pub(super) async fn connect(address: &SocketAddress) -> Result<AsyncFd<OwnedFd>, NbdError> {
    match address {
        SocketAddress::Unix {
            path,
            is_abstract,
            tight,
        } => {
            let peer = unix_address(path.as_os_str().as_bytes(), *is_abstract, *tight)
                .map_err(|_| NbdError::PathTooLong { path: path.clone() })?;
            connect_to(AddressFamily::UNIX, &peer.into())
                .await
                .map_err(|error| NbdError::connect(address, error))
        }
        SocketAddress::Inet(inet) => connect_inet(address, inet).await,
    }
}

fn unix_address(path: &[u8], is_abstract: bool, tight: bool) -> Result<SocketAddrUnix, Errno> {
    if !is_abstract {
        return SocketAddrUnix::new(path);
    }
    if tight {
        return SocketAddrUnix::new_abstract_name(path);
    }
    // The whole of `sun_path`, padded with NULs.
    let mut name = [0; 107];
    name.get_mut(..path.len())
        .ok_or(Errno::NAMETOOLONG)?
        .copy_from_slice(path);
    SocketAddrUnix::new_abstract_name(&name)
}

async fn connect_inet(
    address: &SocketAddress,
    inet: &InetAddress,
) -> Result<AsyncFd<OwnedFd>, NbdError> {
    let resolve = |reason: &str| NbdError::Resolve {
        host: inet.host.clone(),
        port: inet.port.clone(),
        reason: reason.to_owned(),
    };
    let port = match inet.port.parse::<u16>() {
        Ok(port) => port,
        Err(_) if inet.port == SERVICE.0 => SERVICE.1,
        Err(_) => return Err(resolve("Servname not supported for ai_socktype")),
    };
    let host = inet.host.clone();
    let found = unblock(move || -> io::Result<Vec<SocketAddr>> {
        Ok((host.as_str(), port).to_socket_addrs()?.collect())
    })
    .await
    .map_err(|error| {
        // The standard library puts words of its own before the resolver's.
        let text = error.to_string();
        resolve(text.rsplit(": ").next().unwrap_or(&text))
    })?;
    let allowed = |address: &&SocketAddr| match address.ip() {
        IpAddr::V4(_) => inet.ipv4.unwrap_or(inet.ipv6 != Some(true)),
        IpAddr::V6(_) => inet.ipv6.unwrap_or(inet.ipv4 != Some(true)),
    };
    let mut last = None;
    for peer in found.iter().filter(allowed) {
        let family = match peer {
            SocketAddr::V4(_) => AddressFamily::INET,
            SocketAddr::V6(_) => AddressFamily::INET6,
        };
        match connect_to(family, &(*peer).into()).await {
            Ok(fd) => {
                set_options(fd.get_ref(), inet)
                    .map_err(|error| NbdError::connect(address, error))?;
                return Ok(fd);
            }
            Err(error) => last = Some(error),
        }
    }
    Err(match last {
        Some(error) => NbdError::connect(address, error),
        None => resolve("Address family for hostname not supported"),
    })
}

fn set_options(fd: &OwnedFd, inet: &InetAddress) -> io::Result<()> {
    sockopt::set_tcp_nodelay(fd, true)?;
    if inet.keep_alive {
        sockopt::set_socket_keepalive(fd, true)?;
    }
    Ok(())
}

async fn connect_to(family: AddressFamily, peer: &SocketAddrAny) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = socket_with(family, SocketType::STREAM, flags, None)?;
    // epoll calls an unconnected socket hung up, so the first call comes before.
    let mut pending = rustix::net::connect(&fd, peer);
    while pending == Err(Errno::AGAIN) {
        // A local server's queue is full, and nothing tells when it is not.
        sleep(BUSY_PAUSE).await;
        pending = rustix::net::connect(&fd, peer);
    }
    match pending {
        Ok(()) => return AsyncFd::new(fd),
        Err(Errno::INPROGRESS | Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let fd = AsyncFd::new(fd)?;
    fd.io(Interest::Writable, |fd| {
        match rustix::net::connect(fd, peer) {
            Ok(()) | Err(Errno::ISCONN) => Ok(()),
            Err(Errno::ALREADY | Errno::INPROGRESS) => Err(io::ErrorKind::WouldBlock.into()),
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    Ok(fd)
}
