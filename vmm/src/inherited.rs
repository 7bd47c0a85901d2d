//! Listening sockets that the process was started with: by number, or by the name
//! that the service manager gave them (`LISTEN_FDS`, `LISTEN_FDNAMES`; see
//! sd_listen_fds(3)).
//!
//! They are not taken from whoever passed them, but duplicated: a number can be
//! given twice, and a wrong one does no harm.

use std::env;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process;

use rustix::net::{AddressFamily, SocketType, getsockname};
use rustix::net::{SocketAddrAny, sockopt};

use crate::storage_daemon::daemonize;

/// The first descriptor that a service manager passes.
const FIRST: RawFd = 3;
/// More are not passed by anybody.
const COUNT_MAX: RawFd = 4096;

/// Why there is no such socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InheritedError {
    /// No name like that.
    #[error(
        "No socket named '{0}' was passed to this process; LISTEN_FDNAMES has no such name, or \
         LISTEN_PID is not this process"
    )]
    NoSuchName(String),
    /// No descriptor like that.
    #[error("File descriptor {number} was not passed to this process")]
    NoSuchNumber {
        /// The number.
        number: RawFd,
        /// Why.
        source: io::Error,
    },
    /// Something else.
    #[error("File descriptor {number} is not a listening unix socket")]
    NotListening {
        /// The number.
        number: RawFd,
    },
}

/// The number of a descriptor that is given by number or by name.
///
/// Errors: no such name.
pub(crate) fn number_of(text: &str) -> Result<RawFd, InheritedError> {
    if let Ok(number) = text.parse::<RawFd>()
        && number >= 0
    {
        return Ok(number);
    }
    let variable = |name| env::var(name).unwrap_or_default();
    let pid = process::id();
    let for_us = |passed: u32| passed == pid || Some(passed) == daemonize::launcher();
    if !variable("LISTEN_PID").parse().is_ok_and(for_us) {
        return Err(InheritedError::NoSuchName(text.to_owned()));
    }
    find_name(&variable("LISTEN_FDS"), &variable("LISTEN_FDNAMES"), text)
        .ok_or_else(|| InheritedError::NoSuchName(text.to_owned()))
}

/// The number of the first descriptor with a name. Without names all are called
/// `unknown`, as sd_listen_fds_with_names(3) says.
fn find_name(count: &str, names: &str, name: &str) -> Option<RawFd> {
    let count: RawFd = count.parse().ok()?;
    let numbers = FIRST..FIRST.checked_add(count.clamp(0, COUNT_MAX))?;
    if names.is_empty() {
        return numbers.into_iter().next().filter(|_| name == "unknown");
    }
    let mut named = numbers.zip(names.split(':'));
    named
        .find(|(_, has)| *has == name)
        .map(|(number, _)| number)
}

/// A listening unix socket, non-blocking.
///
/// Errors: no such descriptor, or it is something else.
pub(crate) fn unix_listener(number: RawFd) -> Result<UnixListener, InheritedError> {
    let socket =
        duplicate(number).map_err(|source| InheritedError::NoSuchNumber { number, source })?;
    let is_unix = getsockname(&socket)
        .is_ok_and(|address: SocketAddrAny| address.address_family() == AddressFamily::UNIX);
    let is_stream = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM);
    let listens = sockopt::socket_acceptconn(&socket).unwrap_or(false);
    let listener = UnixListener::from(socket);
    if !(is_unix && is_stream && listens) || listener.set_nonblocking(true).is_err() {
        return Err(InheritedError::NotListening { number });
    }
    Ok(listener)
}

fn duplicate(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes numbers only: it makes a new descriptor, or
    // fails.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, FIRST) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was made just now, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn names_are_counted_from_the_first_descriptor() {
        assert_eq!(find_name("2", "qmp:nbd", "qmp"), Some(3));
        assert_eq!(find_name("2", "qmp:nbd", "nbd"), Some(4));
        assert_eq!(find_name("1", "qmp:nbd", "nbd"), None);
        assert_eq!(find_name("2", "", "unknown"), Some(3));
        assert_eq!(find_name("0", "", "unknown"), None);
        for count in ["", "x", "-1", "99999999999"] {
            assert_eq!(find_name(count, "a", "a"), None, "{count}");
        }
        assert_eq!(find_name("2147483647", "a", "a"), Some(3));
    }

    #[test]
    fn only_a_listening_socket_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("s")).unwrap();
        assert!(unix_listener(listener.as_raw_fd()).is_ok());
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(matches!(
            unix_listener(stream.as_raw_fd()),
            Err(InheritedError::NotListening { .. })
        ));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            unix_listener(file.as_raw_fd()),
            Err(InheritedError::NotListening { .. })
        ));
        assert!(matches!(
            unix_listener(1 << 20),
            Err(InheritedError::NoSuchNumber { .. })
        ));
        assert!(number_of("-1").is_err());
        assert_eq!(number_of("7").unwrap(), 7);
    }
}
