//! What a node is called after: the file behind it, or the options that make it.
//!
//! A name that somebody could open the same node by is shown as it is. Where options of
//! its own, another child than a file, or another backing image than the header names
//! make it another node, `json:` and these options are shown, as QEMU does: clients
//! compare names to tell whether a node shows a file as it stands.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::rc::Rc;

use super::topology::{NodeEntry, Topology};
use crate::driver::ChildRole;
use crate::options::{BackingRef, DriverOptions, OptionValue, SocketAddress};

/// Longest name in bytes, as in QEMU; what is longer is cut, and says so.
const MAX_LEN: usize = 4095;

/// The order in which QEMU shows options, as far as it was seen.
const ORDER: &[&str] = &[
    "state",
    "opt-write-zero",
    "immediately",
    "set-state.0.event",
    "once",
    "max-write-zero",
    "image",
    "max-transfer",
    "offset",
    "backing",
    "data-file",
    "read-zeroes",
    "throttle-group",
    "server.path",
    "server.port",
    "server.host",
    "driver",
    "config",
    "filename",
    "size",
    "file",
    "target",
    "export",
    "server.type",
    "iotype",
    "set-state.0.new_state",
    "event",
    "errno",
    "opt-discard",
    "set-state.0.state",
    "sector",
    "max-discard",
    "align",
];

/// What a node is called.
#[derive(Clone, Debug, Default)]
struct Name {
    /// A name that it can be opened by.
    exact: Option<String>,
    /// The options that make it, as a JSON object, cut at [`MAX_LEN`].
    options: String,
}

impl Name {
    fn shown(&self) -> String {
        if let Some(exact) = &self.exact {
            return exact.clone();
        }
        let mut shown = format!("json:{}", self.options);
        if shown.len() > MAX_LEN {
            // The text is ASCII.
            shown.truncate(MAX_LEN - 3);
            shown.push_str("...");
        }
        shown
    }
}

/// Names of nodes, each worked out once: nodes may be reached on many ways.
pub(super) struct Filenames<'a> {
    topology: &'a Topology,
    known: HashMap<u64, Rc<Name>>,
}

impl<'a> Filenames<'a> {
    pub(super) fn new(topology: &'a Topology) -> Self {
        Self {
            topology,
            known: HashMap::new(),
        }
    }

    /// What `node` is called; empty if it is not in the graph.
    pub(super) fn shown(&mut self, node: u64) -> String {
        match self.topology.node(node) {
            Some(_) => self.name(node).shown(),
            None => String::new(),
        }
    }

    /// Depth: that of the graph.
    fn name(&mut self, node: u64) -> Rc<Name> {
        if let Some(name) = self.known.get(&node) {
            return Rc::clone(name);
        }
        let name = match self.topology.node(node) {
            Some(entry) => Rc::new(self.name_of(entry)),
            None => Rc::default(),
        };
        self.known.insert(node, Rc::clone(&name));
        name
    }

    fn name_of(&mut self, entry: &NodeEntry) -> Name {
        let driver = entry.node.driver_name();
        let own = own_options(entry);
        let is_plain = own.is_empty();
        let mut options = vec![("driver".to_owned(), text(driver))];
        options.extend(own);
        let backing = self.other_backing(entry);
        for edge in &entry.children {
            let role = edge.child.role();
            if role != ChildRole::Backing || backing.is_some() {
                let child = self.name(edge.target.id());
                options.push((role.as_str().to_owned(), child.options.clone()));
            }
        }
        if backing == Some(None) {
            options.push(("backing".to_owned(), "null".to_owned()));
        }
        let child = |role| entry.children.iter().find(|edge| edge.child.role() == role);
        let exact = match driver {
            "file" | "host_device" | "nbd" => Some(entry.node.driver().filename()),
            "null-co" | "null-aio" => is_plain.then(|| entry.node.driver().filename()),
            // They show what is below under its own name.
            "mirror_top" | "copy-before-write" | "snapshot-access" => {
                let below = entry.node.driver().filtered();
                let below = below.or_else(|| Some(Rc::new(child(ChildRole::File)?).target.clone()));
                let below = below.map(|below| self.name(below.id()).shown());
                return Name {
                    exact: below,
                    options: object(options),
                };
            }
            "blkdebug" => child(ChildRole::Image).and_then(|edge| {
                let image = self.name(edge.target.id()).exact.clone()?;
                let config = blkdebug_config(entry)?;
                Some(format!("blkdebug:{config}:{image}"))
            }),
            "raw" | "qcow2" if is_plain && backing.is_none() => {
                child(ChildRole::File).and_then(|edge| {
                    let is_protocol = is_protocol(edge.target.driver_name());
                    self.name(edge.target.id())
                        .exact
                        .clone()
                        .filter(|_| is_protocol)
                })
            }
            _ => None,
        };
        Name {
            exact: exact.filter(|name| !name.is_empty()),
            options: object(options),
        }
    }

    /// Whether the backing image is another one than the header of an image names: its
    /// node, or `Some(None)` if there is none though the header names one.
    fn other_backing(&mut self, entry: &NodeEntry) -> Option<Option<u64>> {
        let given = entry.given.as_ref()?;
        let DriverOptions::Qcow2(options) = &given.driver else {
            return None;
        };
        let details = entry.node.driver().image_details();
        let named = details.and_then(|details| details.backing_filename);
        let mut edges = entry.children.iter();
        let backing = edges.find(|edge| edge.child.role() == ChildRole::Backing);
        match (backing, &options.backing) {
            (None, _) => named.map(|_| None),
            (Some(_), BackingRef::Header) => None,
            (Some(edge), _) => {
                let id = edge.target.id();
                let is_same = named.is_some_and(|named| named == self.name(id).shown());
                (!is_same).then_some(Some(id))
            }
        }
    }
}

/// Drivers whose nodes stand for something outside of the graph.
fn is_protocol(driver: &str) -> bool {
    [
        "file",
        "host_device",
        "null-co",
        "null-aio",
        "nbd",
        "blkdebug",
    ]
    .contains(&driver)
}

/// The configuration of a `blkdebug` node that says nothing else of itself.
fn blkdebug_config(entry: &NodeEntry) -> Option<String> {
    let said = &entry.given.as_ref()?.said;
    match said.as_slice() {
        [] => Some(String::new()),
        [(name, OptionValue::Text(config))] if name == "config" => Some(config.clone()),
        _ => None,
    }
}

/// What makes a node beside its driver and its children, each as JSON.
fn own_options(entry: &NodeEntry) -> Vec<(String, String)> {
    let Some(given) = &entry.given else {
        return Vec::new();
    };
    let mut own: Vec<(String, String)> = given
        .said
        .iter()
        .map(|(name, value)| {
            let value = match value {
                OptionValue::Int(value) => value.to_string(),
                OptionValue::Bool(value) => value.to_string(),
                OptionValue::Text(value) => text(value),
            };
            (name.clone(), value)
        })
        .collect();
    let mut add = |name: &str, value: &str| own.push((name.to_owned(), text(value)));
    match &given.driver {
        DriverOptions::File(_) => add("filename", &entry.node.driver().filename()),
        DriverOptions::Throttle(options) => add("throttle-group", &options.group),
        DriverOptions::Nbd(options) => {
            match &options.server {
                SocketAddress::Unix { path, .. } => {
                    add("server.type", "unix");
                    add("server.path", &path.to_string_lossy());
                }
                SocketAddress::Inet(inet) => {
                    add("server.type", "inet");
                    add("server.host", &inet.host);
                    add("server.port", &inet.port);
                }
            }
            if !options.export.is_empty() {
                add("export", &options.export);
            }
        }
        _ => (),
    }
    own
}

/// A JSON object of these members, cut at [`MAX_LEN`].
fn object(mut members: Vec<(String, String)>) -> String {
    members.sort_by_key(|(name, _)| rank(name));
    let mut object = String::from("{");
    for (index, (name, value)) in members.iter().enumerate() {
        if object.len() > MAX_LEN {
            break;
        }
        let comma = if index == 0 { "" } else { ", " };
        object.push_str(comma);
        object.push_str(&text(name));
        object.push_str(": ");
        object.push_str(value);
    }
    object.push('}');
    object.truncate(MAX_LEN + 1);
    object
}

/// Where an option has its place; rules of `blkdebug` by their fields, then their numbers.
fn rank(name: &str) -> (usize, String) {
    let field = match name.strip_prefix("inject-error.") {
        Some(rest) => rest.split_once('.').map_or(rest, |(_, field)| field),
        None => name,
    };
    // The errno of a rule follows its event.
    let place = ORDER.iter().position(|known| *known == field);
    let place = match field {
        "errno" => place.map(|place| place - 1),
        _ => place,
    };
    let number = name.replace("errno", "event.errno");
    (place.unwrap_or(ORDER.len()), number)
}

/// A string in JSON, ASCII only.
fn text(value: &str) -> String {
    let mut text = String::with_capacity(value.len() + 2);
    text.push('"');
    for character in value.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            ' '..='~' => text.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing to a string does not fail.
                    let _ = write!(text, "\\u{unit:04X}");
                }
            }
        }
    }
    text.push('"');
    text
}

#[cfg(all(test, not(shuttle)))]
mod tests;
