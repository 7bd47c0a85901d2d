//! The target of `drive-mirror` and `drive-backup`: a file or an address instead of a
//! node.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use block::runtime::unblock;
use block::{
    AttachmentKind, Backend, BackendUser, DetectZeroes, DiscardMode, Graph, Node, Perm,
    Permissions, os_text,
};
use jobs::mirror::SyncMode;
use serde_json::{Value, json};

use crate::job_client::NbdUri;
use crate::monitor::commands::{blockdev, bounded};
use crate::monitor::error::QmpError;

/// `mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::monitor::commands) enum Mode {
    /// The image is there.
    Existing,
    /// It is made.
    AbsolutePaths,
}

/// What the user asked for.
pub(in crate::monitor::commands) struct Wanted {
    pub(in crate::monitor::commands) target: String,
    pub(in crate::monitor::commands) format: Option<String>,
    pub(in crate::monitor::commands) node_name: Option<String>,
    pub(in crate::monitor::commands) mode: Mode,
    pub(in crate::monitor::commands) sync: SyncMode,
}

/// Formats that an image can be opened with.
const FORMATS: &[&str] = &["raw", "qcow2", "file"];
/// Drivers without a file format of their own, so that no image can be made.
const NO_FORMATS: &[&str] = &[
    "blkdebug",
    "file",
    "host_device",
    "nbd",
    "null-aio",
    "null-co",
    "preallocate",
    "throttle",
];
/// How a qcow2 image begins.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// What is had to make an image as large as it should be: nobody else writes it.
const MAKER: Permissions = Permissions {
    need: Perm::WRITE,
    share: Perm::RESIZE,
};

/// A target that was opened. Dropped, the node goes if nobody else uses it.
pub(in crate::monitor::commands) struct Target {
    graph: Rc<Graph>,
    hold: Arc<Backend>,
    is_new: bool,
}

impl Target {
    pub(in crate::monitor::commands) fn node(&self) -> Arc<Node> {
        self.hold.root()
    }

    /// Whether it was made just now, and so reads as zeroes.
    pub(in crate::monitor::commands) fn is_new(&self) -> bool {
        self.is_new
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.graph.detach(&self.hold);
    }
}

struct TargetHold;

impl BackendUser for TargetHold {
    fn holds_requests(&self) -> bool {
        false
    }

    fn kind(&self) -> AttachmentKind {
        AttachmentKind::Job
    }

    fn describe(&self) -> String {
        "a target that is being opened".to_owned()
    }
}

/// Where the data is.
#[derive(Debug, PartialEq)]
enum Place {
    File(String),
    /// Options of the node that connects there.
    Nbd(Value),
}

impl Place {
    fn parse(target: &str) -> Result<Self, QmpError> {
        if let Some(path) = target.strip_prefix("file:") {
            return Ok(Self::File(path.to_owned()));
        }
        if let Some(uri) = NbdUri::parse(target) {
            let uri = uri.map_err(QmpError::generic)?;
            return Ok(Self::Nbd(uri.node_options()));
        }
        if let Some(rest) = target.strip_prefix("nbd:") {
            return legacy_nbd(rest).map(Self::Nbd);
        }
        // As QEMU has it: a colon before the first slash ends a protocol's name.
        match target.split_once(':') {
            Some((protocol, _)) if !protocol.contains('/') => {
                Err(QmpError::generic(format!("Unknown protocol '{protocol}'")))
            }
            _ => Ok(Self::File(target.to_owned())),
        }
    }

    fn node_options(self) -> Value {
        match self {
            Self::File(path) => json!({"driver": "file", "filename": path}),
            Self::Nbd(options) => options,
        }
    }
}

/// `unix:PATH[:exportname=NAME]` and `HOST:PORT[:exportname=NAME]`.
fn legacy_nbd(text: &str) -> Result<Value, QmpError> {
    let (address, export) = text.split_once(":exportname=").unwrap_or((text, ""));
    let server = match address.strip_prefix("unix:") {
        Some(path) => json!({"type": "unix", "path": path}),
        None => match address.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() => {
                let host = host.trim_start_matches('[').trim_end_matches(']');
                json!({"type": "inet", "host": host, "port": port})
            }
            _ => {
                return Err(QmpError::generic(format!(
                    "error parsing address '{address}'"
                )));
            }
        },
    };
    Ok(json!({"driver": "nbd", "server": server, "export": export}))
}

/// Opens the target, and makes it before if it is to be made.
///
/// Cancel: the target is closed; a file that was made stays.
pub(in crate::monitor::commands) async fn open(
    graph: &Rc<Graph>,
    source: &Arc<Node>,
    wanted: Wanted,
) -> Result<Target, QmpError> {
    let place = Place::parse(&wanted.target)?;
    let format = match wanted.mode {
        Mode::Existing => existing_format(&place, wanted.format.as_deref()).await?,
        Mode::AbsolutePaths => {
            check_can_be_made(source, &wanted, &place)?;
            "raw"
        }
    };
    let made = match (&place, wanted.mode) {
        (Place::File(path), Mode::AbsolutePaths) => {
            make_file(graph, path).await?;
            true
        }
        _ => false,
    };
    let options = node_options(source, format, wanted.node_name, place);
    let options = blockdev::inner_options(options)?;
    let opened = graph.open_for(options, Arc::new(TargetHold));
    let target = Target {
        graph: Rc::clone(graph),
        hold: bounded("Opening the target", opened).await??,
        is_new: made,
    };
    if made {
        make_size(&target, source.size()).await?;
    }
    Ok(target)
}

fn node_options(
    source: &Node,
    format: &str,
    node_name: Option<String>,
    place: Place,
) -> serde_json::Map<String, Value> {
    let as_source = source.options();
    let mut options = serde_json::Map::new();
    match (format, place.node_options()) {
        ("file", Value::Object(file)) => options = file,
        (format, file) => {
            options.insert("driver".to_owned(), format.into());
            options.insert("file".to_owned(), file);
        }
    }
    if let Some(name) = node_name {
        options.insert("node-name".to_owned(), name.into());
    }
    options.insert(
        "cache".to_owned(),
        json!({"direct": as_source.cache.direct, "no-flush": as_source.cache.no_flush}),
    );
    let discard = match as_source.discard {
        DiscardMode::Unmap => "unmap",
        DiscardMode::Ignore => "ignore",
    };
    options.insert("discard".to_owned(), discard.into());
    let detect_zeroes = match as_source.detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    options.insert("detect-zeroes".to_owned(), detect_zeroes.into());
    options
}

/// The format of an image that is there: what the user says, or what it begins with.
async fn existing_format(place: &Place, format: Option<&str>) -> Result<&'static str, QmpError> {
    if let Some(format) = format.filter(|format| !format.is_empty()) {
        let known = FORMATS.iter().find(|known| **known == format);
        return known
            .copied()
            .ok_or_else(|| QmpError::generic(format!("Unknown driver '{format}'")));
    }
    let Place::File(path) = place else {
        return Ok("raw");
    };
    let path = PathBuf::from(path);
    let begins = {
        let path = path.clone();
        unblock(move || {
            let mut begins = [0; 4];
            // Neither a FIFO nor a device that waits keeps the helper thread.
            let mut file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)?;
            match file.read_exact(&mut begins) {
                Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(error),
                _ => Ok(begins),
            }
        })
        .await
    };
    match begins {
        Ok(QCOW2_MAGIC) => Ok("qcow2"),
        Ok(_) => Ok("raw"),
        Err(error) => Err(QmpError::generic(format!(
            "Could not open '{}': {}",
            path.display(),
            os_text(&error)
        ))),
    }
}

/// Whether an image can be made as it is asked for: a raw file.
fn check_can_be_made(source: &Arc<Node>, wanted: &Wanted, place: &Place) -> Result<(), QmpError> {
    match wanted.format.as_deref().unwrap_or(source.driver_name()) {
        "raw" => {}
        "qcow2" => {
            return Err(QmpError::generic(
                "Cannot create a 'qcow2' image: create it with qemu-img, and use mode 'existing'",
            ));
        }
        known if NO_FORMATS.contains(&known) => {
            return Err(QmpError::generic(format!(
                "Format driver '{known}' does not support image creation"
            )));
        }
        unknown => {
            return Err(QmpError::generic(format!(
                "Unknown file format '{unknown}'"
            )));
        }
    }
    let shows_through = match wanted.sync {
        SyncMode::None => true,
        SyncMode::Top => source.backing().is_some(),
        SyncMode::Full | SyncMode::Incremental | SyncMode::Bitmap => false,
    };
    if shows_through {
        return Err(QmpError::generic(
            "Backing file not supported for file format 'raw'",
        ));
    }
    match place {
        Place::File(_) => Ok(()),
        Place::Nbd(_) => Err(QmpError::generic(
            "Cannot create an NBD export: have the server export one, and use mode 'existing'",
        )),
    }
}

/// Makes an empty file, or takes one that is there and not used as it is.
async fn make_file(graph: &Graph, path: &str) -> Result<(), QmpError> {
    let files: Vec<_> = graph
        .nodes()
        .into_iter()
        .filter(|node| matches!(node.driver, "file" | "host_device"))
        .map(|node| (node.name, node.filename))
        .collect();
    let refused = |why: &str| QmpError::generic(format!("Could not create '{path}': {why}"));
    let target = PathBuf::from(path);
    let made = unblock(move || {
        // What it holds is not touched before it is locked.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .custom_flags(libc::O_NONBLOCK)
            .open(target)?;
        let made = file.metadata()?;
        let used = files.into_iter().find(|(_, filename)| {
            fs::metadata(filename)
                .is_ok_and(|known| (known.dev(), known.ino()) == (made.dev(), made.ino()))
        });
        Ok::<_, io::Error>((made.file_type(), used.map(|(name, _)| name)))
    })
    .await
    .map_err(|error| refused(&os_text(&error)))?;
    match made {
        (_, Some(node)) => Err(refused(&format!("it is open as node '{node}'"))),
        (kind, None) if kind.is_file() => Ok(()),
        (kind, None) if kind.is_block_device() => {
            Err(refused("it is a block device; use mode 'existing'"))
        }
        _ => Err(refused("it is no regular file")),
    }
}

/// Empties the image, and gives it its size.
async fn make_size(target: &Target, size: u64) -> Result<(), QmpError> {
    let (graph, node) = (&target.graph, target.node());
    graph.set_permissions(&target.hold, MAKER)?;
    for size in [0, size] {
        if node.size() != size {
            bounded("Making the target", graph.resize(&node, size)).await??;
        }
    }
    graph.set_permissions(&target.hold, Permissions::IDLE)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nbd(target: &str) -> Value {
        match Place::parse(target).expect("an address") {
            Place::Nbd(options) => options,
            Place::File(path) => panic!("'{path}' is no address"),
        }
    }

    fn refusal(target: &str) -> String {
        Place::parse(target).unwrap_err().to_string()
    }

    #[test]
    fn a_target_is_a_path_unless_it_names_a_protocol() {
        for (target, path) in [
            ("x.img", "x.img"),
            ("/a:b/x.img", "/a:b/x.img"),
            ("./a:b", "./a:b"),
            ("file:/x", "/x"),
            ("", ""),
        ] {
            assert_eq!(
                Place::parse(target).unwrap(),
                Place::File(path.to_owned()),
                "{target}"
            );
        }
        assert_eq!(refusal("ftp:x"), "Unknown protocol 'ftp'");
    }

    #[test]
    fn exports_are_named_by_uri_or_in_qemus_old_way() {
        let unix =
            json!({"driver": "nbd", "export": "e", "server": {"type": "unix", "path": "/s"}});
        assert_eq!(nbd("nbd:unix:/s:exportname=e"), unix);
        assert_eq!(nbd("nbd+unix:///e?socket=/s"), unix);
        let inet = |host: &str, export: &str| {
            json!({"driver": "nbd", "export": export,
                   "server": {"type": "inet", "host": host, "port": "10809"}})
        };
        assert_eq!(nbd("nbd:h:10809"), inet("h", ""));
        assert_eq!(nbd("nbd:[::1]:10809:exportname=a:b"), inet("::1", "a:b"));
        assert_eq!(nbd("nbd://h/e"), inet("h", "e"));
        assert_eq!(refusal("nbd:x"), "error parsing address 'x'");
        assert_eq!(refusal("nbd::1"), "error parsing address ':1'");
    }
}
