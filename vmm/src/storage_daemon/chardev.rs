//! `--chardev` and `--monitor`: QEMU's way of saying where a monitor listens, so
//! that scripts made for its storage daemon start unchanged. What diptych's own
//! `--qmp` says is the same and shorter.

use std::str::FromStr;

use crate::monitor::{QmpAddress, SocketError, TcpAddress, help_list, parts_with_help};

/// Why such an option is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChardevError {
    /// No `id`.
    #[error("chardev: no id specified")]
    NoId,
    /// An option that is not known.
    #[error("Invalid parameter '{0}'")]
    Unknown(String),
    /// The same twice.
    #[error("Parameter '{0}' is given twice")]
    Twice(String),
    /// A switch that is neither.
    #[error("Parameter '{0}' expects 'on' or 'off'")]
    Switch(String),
    /// Something that QEMU has and diptych has not.
    #[error(
        "{0} is not supported here; give stdio,id=ID or socket,path=PATH,server=on,wait=off,id=ID"
    )]
    NotSupported(String),
    /// Nothing says where.
    #[error(
        "A socket needs a path or a file descriptor; give path=PATH, fd=NUMBER, or host=HOST,port=PORT"
    )]
    NoAddress,
    /// More than one says where.
    #[error("None or one of 'path', 'fd' or 'host' option required.")]
    TwoAddresses,
    /// A host without a port.
    #[error("chardev: socket: no port given")]
    NoPort,
    /// The path cannot be one.
    #[error("{0}")]
    Address(String),
    /// No chardev for a monitor.
    #[error("Parameter 'chardev' is missing")]
    NoChardev,
    /// The human monitor.
    #[error("Only QMP is supported; leave mode out, or give mode=control")]
    NotQmp,
}

/// Where clients of a monitor come from, by QEMU's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chardev {
    /// Its name.
    pub(super) id: String,
    /// Where it is.
    pub(super) place: Place,
}

/// See [`Chardev`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// A socket that is listened on.
    Socket(QmpAddress),
    /// One client, at stdin and stdout.
    Stdio,
}

/// A monitor on a chardev.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MonitorOption {
    /// The name of the chardev.
    pub(super) chardev: String,
}

impl FromStr for Chardev {
    type Err = ChardevError;

    fn from_str(text: &str) -> Result<Self, ChardevError> {
        let mut options = Options::parse(text, "backend")?;
        let id = options.take("id").filter(|id| !id.is_empty());
        let id = id.ok_or(ChardevError::NoId)?;
        match options.take("backend").as_deref() {
            Some("socket") => {}
            Some("stdio") => {
                // A terminal's keys send signals in any case.
                options.take_switch("signal")?;
                options.finish()?;
                let place = Place::Stdio;
                return Ok(Self { id, place });
            }
            Some(other) => {
                return Err(ChardevError::NotSupported(format!(
                    "A character device of type '{other}'"
                )));
            }
            None => return Err(ChardevError::NoAddress),
        }
        // QEMU connects to somebody else's socket then.
        if !options.take_switch("server")?.unwrap_or(false) {
            return Err(ChardevError::NotSupported(
                "A socket without server=on".to_owned(),
            ));
        }
        // Nobody is waited for: a client may come at any time.
        options.take_switch("wait")?;
        let bad = |error: SocketError| ChardevError::Address(error.to_string());
        let is_tcp = options.has("host") || options.has("port");
        let address = match (options.take("path"), options.take("fd")) {
            (None, None) if is_tcp => QmpAddress::tcp(options.tcp_address()?),
            (Some(_), _) | (_, Some(_)) if is_tcp => return Err(ChardevError::TwoAddresses),
            (Some(path), None) if !path.is_empty() => QmpAddress::at(path.as_ref()),
            (None, Some(fd)) => format!("fd:{fd}").parse().map_err(bad)?,
            (Some(_), Some(_)) => return Err(ChardevError::TwoAddresses),
            _ => return Err(ChardevError::NoAddress),
        };
        options.finish()?;
        let place = Place::Socket(address);
        Ok(Self { id, place })
    }
}

impl FromStr for MonitorOption {
    type Err = ChardevError;

    fn from_str(text: &str) -> Result<Self, ChardevError> {
        let mut options = Options::parse(text, "chardev")?;
        let chardev = options.take("chardev").filter(|id| !id.is_empty());
        let chardev = chardev.ok_or(ChardevError::NoChardev)?;
        options.take("id");
        // Replies are on one line each, whatever is asked for: JSON either way.
        options.take_switch("pretty")?;
        match options.take("mode").as_deref() {
            None | Some("control") => {}
            Some(_) => return Err(ChardevError::NotQmp),
        }
        options.finish()?;
        Ok(Self { chardev })
    }
}

/// What `--chardev help` and `--chardev TYPE,help` tell; `None`: no help is asked for.
pub(super) fn chardev_help(text: &str) -> Option<String> {
    let parts = parts_with_help(text)?;
    let kind = parts.first()?;
    Some(match kind.strip_prefix("backend=").unwrap_or(kind) {
        "socket" => help_list(
            "socket options",
            [
                "id=<str> (required)",
                "server=on (required)",
                "wait=<bool (on/off)>",
                "path=<str>",
                "fd=<number, or name in LISTEN_FDNAMES>",
                "host=<str>",
                "port=<int> (with host)",
                "to=<int> (with host: the last port to try)",
                "ipv4=<bool (on/off)>",
                "ipv6=<bool (on/off)>",
                "nodelay=<bool (on/off)>",
            ],
        ),
        "stdio" => help_list(
            "stdio options",
            ["id=<str> (required)", "signal=<bool (on/off)>"],
        ),
        _ => help_list("Available chardev backend types", ["socket", "stdio"]),
    })
}

/// What `--monitor help` tells; `None`: no help is asked for.
pub(super) fn monitor_help(text: &str) -> Option<String> {
    // A chardev of that name is `chardev=help`.
    (text == "help" || text == "?").then(|| {
        help_list(
            "monitor options",
            [
                "chardev=<str> (required; the id of a --chardev before it)",
                "mode=<control>",
                "id=<str>",
                "pretty=<bool (on/off)>",
            ],
        )
    })
}

/// Options not taken yet.
struct Options(Vec<(String, String)>);

impl Options {
    /// Splits `VALUE,key=value,switch,noswitch`; `first` is the key of a first part
    /// that has none. A doubled comma is one in a value.
    fn parse(text: &str, first: &str) -> Result<Self, ChardevError> {
        let mut options: Vec<(String, String)> = Vec::new();
        for (index, part) in split(text).into_iter().enumerate() {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, value),
                None if index == 0 => (first, part.as_str()),
                None => match part.strip_prefix("no") {
                    Some(key) => (key, "off"),
                    None => (part.as_str(), "on"),
                },
            };
            if options.iter().any(|(other, _)| other == key) {
                return Err(ChardevError::Twice(key.to_owned()));
            }
            options.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self(options))
    }

    fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(other, _)| other == key)
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let index = self.0.iter().position(|(other, _)| other == key)?;
        Some(self.0.remove(index).1)
    }

    fn take_switch(&mut self, key: &str) -> Result<Option<bool>, ChardevError> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(ChardevError::Switch(key.to_owned())),
        }
    }

    fn tcp_address(&mut self) -> Result<TcpAddress, ChardevError> {
        let port = |text: String| {
            let port = text.parse();
            port.map_err(|_| ChardevError::Address(format!("'{text}' is not a port number")))
        };
        // Nothing is held back that could be sent, in any case.
        self.take_switch("nodelay")?;
        self.take_switch("delay")?;
        Ok(TcpAddress {
            host: self.take("host").unwrap_or_default(),
            port: port(self.take("port").ok_or(ChardevError::NoPort)?)?,
            to: self.take("to").map(port).transpose()?,
            ipv4: self.take_switch("ipv4")?,
            ipv6: self.take_switch("ipv6")?,
        })
    }

    /// Refuses what nobody took.
    fn finish(self) -> Result<(), ChardevError> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((key, _)) => Err(ChardevError::Unknown(key)),
        }
    }
}

fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn at(path: &str) -> Place {
        Place::Socket(QmpAddress::at(Path::new(path)))
    }

    #[test]
    fn chardevs_are_read_as_scripts_write_them() {
        for text in [
            "socket,path=/a/b,server=on,wait=off,id=c",
            "socket,id=c,server,nowait,path=/a/b",
            "backend=socket,server=yes,path=/a/b,id=c",
            "socket,id=c,path=/a/b,server=on",
        ] {
            let chardev: Chardev = text.parse().unwrap();
            assert_eq!(chardev.id, "c", "{text}");
            assert_eq!(chardev.place, at("/a/b"), "{text}");
        }
        let chardev: Chardev = "socket,path=/a,,b,server=on,id=c".parse().unwrap();
        assert_eq!(chardev.place, at("/a,b"));
        let chardev: Chardev = "socket,fd=5,server=on,id=c".parse().unwrap();
        assert_eq!(chardev.place, Place::Socket("fd:5".parse().unwrap()));
        let text = "socket,host=h,port=7,to=9,ipv4=on,nodelay,server=on,wait=off,id=c";
        let chardev: Chardev = text.parse().unwrap();
        let tcp = TcpAddress {
            host: "h".to_owned(),
            port: 7,
            to: Some(9),
            ipv4: Some(true),
            ipv6: None,
        };
        assert_eq!(chardev.place, Place::Socket(QmpAddress::tcp(tcp)));
        let chardev: Chardev = "stdio,id=c,signal=off".parse().unwrap();
        assert_eq!(chardev.place, Place::Stdio);
    }

    #[test]
    fn what_is_wrong_with_a_chardev_is_said() {
        for (text, error) in [
            ("socket,path=/a,server=on", ChardevError::NoId),
            ("socket,path=/a,server=on,id=", ChardevError::NoId),
            ("socket,server=on,id=c", ChardevError::NoAddress),
            ("socket,server=on,id=c,path=", ChardevError::NoAddress),
            (
                "socket,path=/a,fd=3,server=on,id=c",
                ChardevError::TwoAddresses,
            ),
            (
                "socket,path=/a,host=h,port=3,server=on,id=c",
                ChardevError::TwoAddresses,
            ),
            ("socket,host=h,server=on,id=c", ChardevError::NoPort),
            (
                "socket,path=/a,server=on,id=c,foo=1",
                ChardevError::Unknown("foo".to_owned()),
            ),
            (
                "socket,path=/a,server=maybe,id=c",
                ChardevError::Switch("server".to_owned()),
            ),
            (
                "socket,path=/a,path=/b,server=on,id=c",
                ChardevError::Twice("path".to_owned()),
            ),
        ] {
            assert_eq!(text.parse::<Chardev>(), Err(error), "{text}");
        }
        for text in [
            "stdio",
            "stdio,id=c,path=/a",
            "null,id=c",
            "socket,path=/a,id=c",
            "socket,host=h,port=65536,server=on,id=c",
            "socket,host=h,port=1,id=c",
            "",
            ",,,",
        ] {
            assert!(text.parse::<Chardev>().is_err(), "{text}");
        }
    }

    #[test]
    fn monitors_name_a_chardev_and_speak_qmp() {
        for text in [
            "c",
            "chardev=c",
            "c,mode=control",
            "chardev=c,mode=control,pretty=on,id=m",
            "c,pretty",
        ] {
            let monitor: MonitorOption = text.parse().unwrap();
            assert_eq!(monitor.chardev, "c", "{text}");
        }
        for (text, error) in [
            ("", ChardevError::NoChardev),
            ("mode=control", ChardevError::NoChardev),
            ("c,mode=readline", ChardevError::NotQmp),
            ("c,foo", ChardevError::Unknown("foo".to_owned())),
        ] {
            assert_eq!(text.parse::<MonitorOption>(), Err(error), "{text}");
        }
    }
}
