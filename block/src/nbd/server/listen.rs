//! Where the server listens: addresses, sockets, the socket's file.
//!
//! Everything here may block (names are looked up): helper threads only.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::error::os_text;
use crate::runtime::unblock;

/// Where an NBD server listens.
#[derive(Debug)]
pub enum ListenAddress {
    /// A unix socket. A file left behind by a process that is gone is replaced.
    Unix {
        /// Its file.
        path: PathBuf,
    },
    /// TCP.
    Inet {
        /// A name or an address; empty for all addresses of this host.
        host: String,
        /// First port to be tried; 0 lets the system choose.
        port: String,
        /// Last port to be tried.
        to: Option<u16>,
        /// Listen on IPv4 addresses. `None`: where there are any.
        ipv4: Option<bool>,
        /// Listen on IPv6 addresses. `None`: where there are any.
        ipv6: Option<bool>,
    },
    /// A socket that somebody else has made, and that listens already.
    Socket(OwnedFd),
}

/// Why the server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The name or port is not known.
    #[error("address resolution failed for {host}:{port}: {reason}")]
    Resolve {
        /// As it was given.
        host: String,
        /// As it was given.
        port: String,
        /// What the resolver says.
        reason: String,
    },
    /// Both kinds of addresses are excluded.
    #[error("Cannot disable IPv4 and IPv6 at same time")]
    NoFamily,
    /// All ports are taken.
    #[error("Failed to find an available port: {}", os_text(.0))]
    Port(io::Error),
    /// The system does not let us have the address.
    #[error("Failed to bind socket: {}", os_text(.0))]
    Bind(io::Error),
    /// A unix socket's path is empty.
    #[error("The unix socket has no path; give one")]
    NoPath,
    /// A unix socket's path is longer than the system allows.
    #[error("UNIX socket path '{}' is too long", .path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket is at the path.
    #[error(
        "'{}' exists and is not a socket; remove it, or give another path",
        .path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system does not let us have the path.
    #[error("Failed to bind socket to {}: {}", .path.display(), os_text(source))]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A descriptor that was passed is no socket that listens.
    #[error("The descriptor given is not a listening socket: {0}")]
    NotListening(io::Error),
    /// A thread of the server could not be started.
    #[error("Cannot start the NBD server's threads: {0}")]
    Threads(#[from] crate::runtime::RuntimeError),
}

impl ListenAddress {
    /// A socket that this process was given when it was started, by its number.
    ///
    /// Errors: no such descriptor.
    pub fn inherited(number: u32) -> io::Result<Self> {
        let number = i32::try_from(number).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: F_DUPFD_CLOEXEC takes numbers only, and makes a new descriptor,
        // or fails.
        let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
        if copy < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now, and nobody else knows it.
        Ok(Self::Socket(unsafe { OwnedFd::from_raw_fd(copy) }))
    }

    /// Fails as a server there would, and leaves nothing behind: listens for a moment.
    /// Cancel: that goes on to its end.
    pub async fn check(self) -> Result<(), ListenError> {
        unblock(move || listen(self).map(drop)).await
    }
}

/// Sockets that listen, and the file of a unix socket.
#[derive(Debug)]
pub(super) struct Listeners {
    /// Non-blocking.
    pub(super) sockets: Vec<OwnedFd>,
    pub(super) file: Option<SocketFile>,
}

/// The file of a unix socket; removed when this is dropped, if it still is ours.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // It may have been removed by hand meanwhile.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::symlink_metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Begins to listen. Blocks.
pub(super) fn listen(address: ListenAddress) -> Result<Listeners, ListenError> {
    match address {
        ListenAddress::Unix { path } => listen_unix(path),
        ListenAddress::Inet {
            host,
            port,
            to,
            ipv4,
            ipv6,
        } => {
            let addresses = resolve(&host, &port, ipv4, ipv6)?;
            let sockets = listen_inet(&addresses, to).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => ListenError::Port(error),
                _ => ListenError::Bind(error),
            })?;
            Ok(Listeners {
                sockets,
                file: None,
            })
        }
        ListenAddress::Socket(socket) => adopt(socket).map_err(ListenError::NotListening),
    }
}

fn adopt(socket: OwnedFd) -> io::Result<Listeners> {
    if !rustix::net::sockopt::socket_acceptconn(&socket)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    set_nonblocking(&socket)?;
    Ok(Listeners {
        sockets: vec![socket],
        file: None,
    })
}

fn set_nonblocking(socket: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&socket)?;
    Ok(rustix::fs::fcntl_setfl(&socket, flags | OFlags::NONBLOCK)?)
}

fn listen_unix(path: PathBuf) -> Result<Listeners, ListenError> {
    // The kernel's structure has so many bytes, one of them for the end.
    const MAX_PATH: usize = 107;
    if path.as_os_str().is_empty() {
        // The kernel would make a name up that nobody knows.
        return Err(ListenError::NoPath);
    }
    if path.as_os_str().len() > MAX_PATH {
        return Err(ListenError::PathTooLong { path });
    }
    let bound = match UnixListener::bind(&path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(&path)?;
            UnixListener::bind(&path)
        }
        result => result,
    };
    let listener = bound.and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    match listener {
        Ok(listener) => Ok(Listeners {
            sockets: vec![listener.into()],
            file: Some(SocketFile {
                identity: identity(&path),
                path,
            }),
        }),
        Err(source) => Err(ListenError::Path { path, source }),
    }
}

/// Removes the socket file of a process that is gone.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let failed = |source| ListenError::Path {
        path: path.to_owned(),
        source,
    };
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket {
                path: path.to_owned(),
            });
        }
        Ok(_) => (),
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(failed(source)),
    }
    // Without waiting: one that is alive may have more clients than it accepts.
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let connected = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .and_then(|socket| rustix::net::connect(&socket, &SocketAddrUnix::new(path)?));
    match connected {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        // Connected, or too many wait to be: it is alive.
        _ => Err(failed(io::Error::from_raw_os_error(libc::EADDRINUSE))),
    }
}

fn resolve(
    host: &str,
    port: &str,
    ipv4: Option<bool>,
    ipv6: Option<bool>,
) -> Result<Vec<SocketAddr>, ListenError> {
    let failed = |reason: &str| ListenError::Resolve {
        host: host.to_owned(),
        port: port.to_owned(),
        reason: reason.to_owned(),
    };
    let number: u16 = port
        .parse()
        .map_err(|_| failed("Servname not supported for ai_socktype"))?;
    // As QEMU takes them: what is asked for excludes the other, unless both are.
    let (want4, want6) = match (ipv4, ipv6) {
        (Some(false), Some(false)) => return Err(ListenError::NoFamily),
        (Some(true), None) => (true, false),
        (None, Some(true)) => (false, true),
        (four, six) => (four.unwrap_or(true), six.unwrap_or(true)),
    };
    let name = match host {
        "" if want6 => "::",
        "" => "0.0.0.0",
        host => host,
    };
    let addresses = (name, number)
        .to_socket_addrs()
        .map_err(|error| {
            let text = error.to_string();
            failed(
                text.strip_prefix("failed to lookup address information: ")
                    .unwrap_or(&text),
            )
        })?
        .filter(|address| if address.is_ipv4() { want4 } else { want6 });
    let mut unique = Vec::new();
    for address in addresses {
        if !unique.contains(&address) {
            unique.push(address);
        }
    }
    if unique.is_empty() {
        return Err(failed(match name.parse::<IpAddr>() {
            Ok(_) => "Address family for hostname not supported",
            Err(_) => "Name or service not known",
        }));
    }
    Ok(unique)
}

/// Listens on one port of all addresses: the first that is free, of those allowed.
fn listen_inet(addresses: &[SocketAddr], to: Option<u16>) -> io::Result<Vec<OwnedFd>> {
    let first = addresses.first().map_or(0, SocketAddr::port);
    let mut last_error = io::Error::from_raw_os_error(libc::EADDRINUSE);
    for port in first..=to.unwrap_or(first).max(first) {
        match listen_all(addresses, port) {
            Ok(sockets) => return Ok(sockets),
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

fn listen_all(addresses: &[SocketAddr], mut port: u16) -> io::Result<Vec<OwnedFd>> {
    let mut sockets = Vec::with_capacity(addresses.len());
    for address in addresses {
        let mut address = *address;
        address.set_port(port);
        match TcpListener::bind(address) {
            Ok(listener) => {
                listener.set_nonblocking(true)?;
                // Where the system chose, the other addresses take the same.
                port = listener.local_addr()?.port();
                sockets.push(listener.into());
            }
            // A host without IPv6 may still have a name for its addresses.
            Err(error)
                if error.raw_os_error() == Some(libc::EAFNOSUPPORT)
                    || error.kind() == io::ErrorKind::AddrNotAvailable =>
            {
                tracing::debug!(%address, %error, "Address left out");
            }
            Err(error) => return Err(error),
        }
    }
    if sockets.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
    }
    Ok(sockets)
}
