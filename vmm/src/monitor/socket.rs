//! The listening socket: its address on the command line, its file, its end.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::inherited::{self, InheritedError};
use rustix::fs::{Mode, fchmod};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Where a monitor listens: TCP, or `unix:PATH`, or `fd:NUMBER` or `fd:NAME` for a socket
/// that the process was started with.
///
/// The words that QEMU's users append (`,server=on,wait=off`) are accepted and
/// change nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QmpAddress(Place);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Unix(PathBuf),
    /// By number or name.
    Inherited(String),
    /// Anybody who can reach the port can connect.
    Tcp(TcpAddress),
}

/// Where to listen for TCP clients.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TcpAddress {
    /// A name or an address; empty: all addresses.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The last port that will do, if the first is taken.
    pub(crate) to: Option<u16>,
    pub(crate) ipv4: Option<bool>,
    pub(crate) ipv6: Option<bool>,
}

impl TcpAddress {
    /// Listens at the first of its addresses that is free, in non-blocking mode.
    /// Blocks while the name is looked up.
    fn listen(&self) -> Result<OwnedFd, SocketError> {
        let failed = |source: io::Error| SocketError::ListenTcp {
            host: self.host.clone(),
            port: self.port,
            source,
        };
        let hosts: &[&str] = match self.host.as_str() {
            "" => &["::", "0.0.0.0"],
            host => &[host],
        };
        // One that is not said, where the other one is, is not meant.
        let wanted = |own: Option<bool>, other: Option<bool>| own.unwrap_or(other != Some(true));
        let ipv4 = wanted(self.ipv4, self.ipv6);
        let ipv6 = wanted(self.ipv6, self.ipv4);
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for host in hosts {
            let found = (*host, self.port).to_socket_addrs().map_err(failed)?;
            addresses.extend(found.filter(|address| match address {
                SocketAddr::V4(_) => ipv4,
                SocketAddr::V6(_) => ipv6,
            }));
        }
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for port in self.port..=self.to.unwrap_or(self.port).max(self.port) {
            for address in &mut addresses {
                address.set_port(port);
                match TcpListener::bind(*address) {
                    Ok(listener) => {
                        listener.set_nonblocking(true).map_err(failed)?;
                        return Ok(listener.into());
                    }
                    Err(error) => last = error,
                }
            }
        }
        Err(failed(last))
    }
}

impl QmpAddress {
    /// The socket at `path`.
    pub(crate) fn at(path: &Path) -> Self {
        Self(Place::Unix(path.to_owned()))
    }

    /// The socket's file, if it is known.
    pub(crate) fn path(&self) -> Option<&Path> {
        match &self.0 {
            Place::Unix(path) => Some(path),
            Place::Inherited(_) | Place::Tcp(_) => None,
        }
    }

    /// TCP clients.
    pub(crate) fn tcp(address: TcpAddress) -> Self {
        Self(Place::Tcp(address))
    }
}

impl FromStr for QmpAddress {
    type Err = SocketError;

    fn from_str(text: &str) -> Result<Self, SocketError> {
        let bad = || SocketError::Address {
            address: text.to_owned(),
        };
        if let Some(name) = text.strip_prefix("fd:").filter(|name| !name.is_empty()) {
            return Ok(Self(Place::Inherited(name.to_owned())));
        }
        let rest = text.strip_prefix("unix:").ok_or_else(bad)?;
        let mut parts = rest.split(',');
        let path = parts
            .next()
            .filter(|path| !path.is_empty())
            .ok_or_else(bad)?;
        let known = ["server", "server=on", "wait=off", "nowait"];
        if parts.any(|part| !known.contains(&part)) {
            return Err(bad());
        }
        Ok(Self::at(path.as_ref()))
    }
}

/// Why there is no listening socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Not an address that is understood.
    #[error("Bad QMP address '{address}'; give unix:PATH, or fd:NAME for a socket that was passed")]
    Address {
        /// As it was given.
        address: String,
    },
    /// Somebody listens there.
    #[error(
        "Socket {} is in use by another process; stop that one, or give another path",
        .path.display()
    )]
    InUse {
        /// The socket's file.
        path: PathBuf,
    },
    /// The path is taken by something else.
    #[error(
        "{} exists and is not a socket; remove it, or give another path",
        .path.display()
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// There is no folder for the socket's file.
    #[error(
        "Cannot listen on {}: its folder does not exist; create that first, or give another path",
        .path.display()
    )]
    NoFolder {
        /// The socket's file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("Cannot listen on {}", .path.display())]
    Listen {
        /// The socket's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The system refused, or there is no such name.
    #[error("Cannot listen on {host}:{port}")]
    ListenTcp {
        /// As it was given.
        host: String,
        /// The first port.
        port: u16,
        /// Why.
        source: io::Error,
    },
    /// It was not passed.
    #[error(transparent)]
    Inherited(#[from] InheritedError),
}

/// A socket that clients connect to; dropping it removes its file.
///
/// The file is the owner's alone (mode 0600, less what the umask takes): whoever
/// can connect can read and write every image that diptych can.
#[derive(Debug)]
pub(crate) struct QmpSocket {
    listener: OwnedFd,
    /// Its file; where that is somebody else's, what the user calls it.
    path: PathBuf,
    /// Device and inode of the file, so that only our own is removed.
    identity: Option<(u64, u64)>,
}

impl QmpSocket {
    /// Begins to listen. A file left behind by a process that is gone is
    /// replaced.
    ///
    /// Errors: [`SocketError`]; nothing of anybody else's is touched.
    pub(crate) fn bind(address: &QmpAddress) -> Result<Self, SocketError> {
        let path = match &address.0 {
            Place::Unix(path) => path,
            Place::Inherited(name) => {
                return Ok(Self {
                    listener: inherited::unix_listener(inherited::number_of(name)?)?.into(),
                    path: format!("fd:{name}").into(),
                    identity: None,
                });
            }
            Place::Tcp(address) => {
                return Ok(Self {
                    listener: address.listen()?,
                    path: format!("tcp:{}:{}", address.host, address.port).into(),
                    identity: None,
                });
            }
        };
        let failed = |source: io::Error| {
            let path = path.clone();
            match source.kind() {
                io::ErrorKind::NotFound => SocketError::NoFolder { path },
                _ => SocketError::Listen { path, source },
            }
        };
        let listener = match listen_at(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                remove_stale(path)?;
                listen_at(path)
            }
            result => result,
        }
        .map_err(failed)?;
        Ok(Self {
            listener: listener.into(),
            path: path.clone(),
            identity: identity(path),
        })
    }

    /// The descriptor to accept on, in non-blocking mode.
    pub(crate) fn listener(&self) -> io::Result<OwnedFd> {
        self.listener.try_clone()
    }

    /// The socket's file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for QmpSocket {
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

/// A non-blocking listening socket.
fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    // Before bind: the file is never there with wider permissions.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// Removes the socket file of a process that is gone.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let path = path.to_owned();
    match fs::symlink_metadata(&path) {
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NotASocket { path });
        }
        Ok(_) => (),
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(SocketError::Listen { path, source }),
    }
    match UnixStream::connect(&path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(&path).map_err(|source| SocketError::Listen { path, source })
        }
        // Connected, or too many wait to be: it is alive.
        _ => Err(SocketError::InUse { path }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn address(path: &Path) -> QmpAddress {
        format!("unix:{}", path.display()).parse().unwrap()
    }

    #[test]
    fn addresses_are_read_with_and_without_qemus_words() {
        for text in [
            "unix:/a/b",
            "unix:/a/b,server=on,wait=off",
            "unix:/a/b,server,nowait",
        ] {
            let address: QmpAddress = text.parse().unwrap();
            assert_eq!(address.path(), Some(Path::new("/a/b")));
        }
        assert_eq!("fd:qmp".parse::<QmpAddress>().unwrap().path(), None);
        for text in [
            "/a/b",
            "tcp:x:1",
            "unix:",
            "unix:/a,wait=on",
            "unix:/a,x",
            "fd:",
        ] {
            assert!(text.parse::<QmpAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_file_is_the_owners_alone_and_goes_with_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let socket = QmpSocket::bind(&address(&path)).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0);
        assert_eq!(socket.path(), path);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let _socket = QmpSocket::bind(&address(&path)).unwrap();
        let error = QmpSocket::bind(&address(&path)).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error}");
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn a_file_left_behind_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _socket = QmpSocket::bind(&address(&path)).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
    }

    #[test]
    fn something_else_at_the_path_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        fs::write(&path, "precious").unwrap();
        let error = QmpSocket::bind(&address(&path)).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_file_that_took_our_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp.sock");
        let socket = QmpSocket::bind(&address(&path)).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(socket);
        assert!(path.exists());
    }

    #[test]
    fn a_missing_folder_is_an_error_with_its_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none/qmp.sock");
        let error = QmpSocket::bind(&address(&path)).unwrap_err();
        assert!(matches!(error, SocketError::NoFolder { .. }), "{error}");
    }

    #[test]
    fn a_port_that_is_taken_is_left_alone_and_the_next_one_will_do() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let mut address = TcpAddress {
            host: "127.0.0.1".to_owned(),
            port,
            ..TcpAddress::default()
        };
        let error = QmpSocket::bind(&QmpAddress::tcp(address.clone())).unwrap_err();
        assert!(matches!(error, SocketError::ListenTcp { .. }), "{error}");
        address.to = Some(u16::MAX);
        assert!(QmpSocket::bind(&QmpAddress::tcp(address.clone())).is_ok());
        address.ipv4 = Some(false);
        assert!(QmpSocket::bind(&QmpAddress::tcp(address)).is_err());
    }

    #[test]
    fn a_path_that_is_too_long_is_an_error() {
        let long = format!("unix:/tmp/{}", "x".repeat(200));
        let error = QmpSocket::bind(&long.parse().unwrap()).unwrap_err();
        assert!(matches!(error, SocketError::Listen { .. }));
    }
}
