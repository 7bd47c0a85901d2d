//! NBD exports as `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`,
//! the URIs that NBD's own project defines (`doc/uri.md` there), without TLS.

use serde_json::{Value, json};

/// NBD's port by IANA.
const DEFAULT_PORT: &str = "10809";

/// Where an export is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUri {
    server: NbdServer,
    export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum NbdServer {
    Inet { host: String, port: String },
    Unix { path: String },
}

impl NbdUri {
    /// Reads a URI; `None` if it is none of NBD's.
    ///
    /// Errors: one of NBD's that cannot be used, in one line.
    pub fn parse(text: &str) -> Option<Result<Self, String>> {
        let (scheme, rest) = text.split_once("://")?;
        match scheme {
            "nbd" => Some(Self::inet(rest)),
            "nbd+unix" => Some(Self::unix(rest)),
            "nbds" | "nbds+unix" => Some(Err(format!(
                "Cannot use '{text}': NBD over TLS is not supported here"
            ))),
            _ => None,
        }
        .map(|result| result.map_err(|why| format!("Bad NBD address '{text}': {why}")))
    }

    fn inet(rest: &str) -> Result<Self, String> {
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        if path.contains(['?', '#']) {
            return Err("nothing is known to follow the export's name".to_owned());
        }
        let (host, port) = match authority.strip_prefix('[') {
            // IPv6
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or("']' is missing")?;
                match port {
                    "" => (host, DEFAULT_PORT),
                    _ => (host, port.strip_prefix(':').ok_or("no port behind ']'")?),
                }
            }
            None => authority
                .split_once(':')
                .unwrap_or((authority, DEFAULT_PORT)),
        };
        if host.contains('@') {
            return Err("NBD knows no users".to_owned());
        }
        if host.is_empty() {
            return Err("no host; give nbd://HOST/EXPORT".to_owned());
        }
        if !port.bytes().all(|byte| byte.is_ascii_digit()) || port.parse::<u16>().is_err() {
            return Err(format!("'{port}' is no port"));
        }
        Ok(Self {
            server: NbdServer::Inet {
                host: decode(host)?,
                port: port.to_owned(),
            },
            export: decode(path)?,
        })
    }

    fn unix(rest: &str) -> Result<Self, String> {
        let no_socket = "no socket; give nbd+unix:///EXPORT?socket=PATH";
        let (before, query) = rest.split_once('?').ok_or(no_socket)?;
        let export = before.strip_prefix('/').unwrap_or(before);
        let path = query.strip_prefix("socket=").ok_or(no_socket)?;
        if path.is_empty() {
            return Err(no_socket.to_owned());
        }
        if !before.is_empty() && !before.starts_with('/') {
            return Err("a unix socket has no host: three slashes".to_owned());
        }
        Ok(Self {
            server: NbdServer::Unix {
                path: decode(path)?,
            },
            export: decode(export)?,
        })
    }

    /// The options of a node that connects there, without its name.
    pub fn node_options(&self) -> Value {
        let server = match &self.server {
            NbdServer::Inet { host, port } => json!({"type": "inet", "host": host, "port": port}),
            NbdServer::Unix { path } => json!({"type": "unix", "path": path}),
        };
        json!({"driver": "nbd", "server": server, "export": self.export})
    }
}

/// Resolves `%41`.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|byte| char::from(byte).to_digit(16));
        let byte = digit().zip(digit()).map(|(high, low)| high << 4 | low);
        let byte = byte.and_then(|byte| u8::try_from(byte).ok());
        bytes.push(byte.ok_or("'%' wants two hexadecimal digits")?);
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> Value {
        NbdUri::parse(text).unwrap().unwrap().node_options()
    }

    #[test]
    fn uris_of_both_kinds_are_read() {
        let inet = |host, port, export| json!({"driver": "nbd", "export": export, "server": {"type": "inet", "host": host, "port": port}});
        assert_eq!(
            options("nbd://far.example/disk"),
            inet("far.example", "10809", "disk")
        );
        assert_eq!(options("nbd://h:1234/a/b"), inet("h", "1234", "a/b"));
        assert_eq!(options("nbd://h"), inet("h", "10809", ""));
        assert_eq!(options("nbd://[::1]:5/x%20y"), inet("::1", "5", "x y"));
        assert_eq!(options("nbd://[::1]/x"), inet("::1", "10809", "x"));
        let unix = |path, export| json!({"driver": "nbd", "export": export, "server": {"type": "unix", "path": path}});
        assert_eq!(
            options("nbd+unix:///disk?socket=/run/n.sock"),
            unix("/run/n.sock", "disk")
        );
        assert_eq!(options("nbd+unix:///?socket=a%2fb"), unix("a/b", ""));
        assert_eq!(options("nbd+unix://?socket=/s"), unix("/s", ""));
    }

    #[test]
    fn what_cannot_be_used_is_said() {
        for text in [
            "nbd://",
            "nbd:///x",
            "nbd://h:/x",
            "nbd://h:99999/x",
            "nbd://h:+1/x",
            "nbd://u@h/x",
            "nbd://[::1/x",
            "nbd://[::1]9/x",
            "nbd://h/x?tls=1",
            "nbd://h/%4",
            "nbd://h/%zz",
            "nbd://h/%ff",
            "nbd+unix:///x",
            "nbd+unix:///x?socket=",
            "nbd+unix:///x?path=/s",
            "nbd+unix://h/x?socket=/s",
            "nbds://h/x",
        ] {
            assert!(NbdUri::parse(text).unwrap().is_err(), "{text}");
        }
        assert_eq!(NbdUri::parse("disk.img"), None);
        assert_eq!(NbdUri::parse("http://h/x"), None);
    }
}
