//! Objects that users make: `object-add`, `--object`, and their properties.
//!
//! What an object does lives with the kind of thing it is: limits of rates in
//! `block` ([`block::ThrottleGroup`]), threads in its runtime. Here are their
//! names, the properties as the wire has them, and who may delete them. Main
//! thread only. The guest's disks are objects too, by path (`devices`).

use std::cell::RefCell;
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;

use block::runtime::{Iothread, IothreadHandle, unblock};
use block::{GroupError, ThrottleGroup, ThrottleGroups, ThrottleLimits};
use serde_json::{Value, json};

use super::args::Args;
use super::error::QmpError;
use super::schema::{help_list, parts_with_help};

mod devices;
mod iothread;
mod qom;
mod throttle_group;

use iothread::IothreadProperties;
use throttle_group::GroupProperties;

pub(super) use devices::{Found as Device, find as find_device};
pub(super) use qom::{type_names, type_properties};

/// Types that QEMU's storage daemon has and diptych has not.
const UNSUPPORTED: &[&str] = &[
    "authz-list",
    "authz-listfile",
    "authz-pam",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret",
    "secret_keyring",
    "thread-context",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];

/// Types of QEMU's schema that its storage daemon has not either.
const NOT_IN_A_STORAGE_DAEMON: &[&str] = &[
    "can-bus",
    "can-host-socketcan",
    "colo-compare",
    "cryptodev-backend",
    "cryptodev-backend-builtin",
    "cryptodev-backend-lkcf",
    "cryptodev-vhost-user",
    "dbus-vmstate",
    "filter-buffer",
    "filter-dump",
    "filter-mirror",
    "filter-redirector",
    "filter-replay",
    "filter-rewriter",
    "input-barrier",
    "input-linux",
    "memory-backend-epc",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "pef-guest",
    "qtest",
    "rng-builtin",
    "rng-egd",
    "rng-random",
    "s390-pv-guest",
    "sev-guest",
    "x-remote-object",
    "x-vfio-user-server",
];

/// An object to be made, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObjectOptions {
    id: String,
    kind: KindOptions,
}

impl ObjectOptions {
    /// The name that it is to have.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum KindOptions {
    ThrottleGroup(GroupProperties),
    Iothread(IothreadProperties),
}

/// Reads `--object`: JSON if it begins with a brace, else
/// `TYPE,id=NAME,key=value,…`.
///
/// Errors: as `object-add`, as far as they are about the text.
pub(crate) fn parse_object(text: &str) -> Result<ObjectOptions, QmpError> {
    object_options(Args::from_option(text, Some("qom-type"))?)
}

/// What `--object help` and `--object TYPE,help` tell; `None`: no help is asked for.
pub(crate) fn object_help(text: &str) -> Option<String> {
    let parts = parts_with_help(text)?;
    let options = |name: &str, properties: Vec<(&str, &str)>| {
        let rows = properties.into_iter();
        let mut rows: Vec<String> = rows
            .map(|(name, kind)| format!("{name}=<{kind}>"))
            .collect();
        rows.sort_unstable();
        help_list(&format!("{name} options"), rows.iter().map(String::as_str))
    };
    Some(match parts.first().copied() {
        Some(name @ "throttle-group") => options(name, throttle_group::properties().collect()),
        Some(name @ "iothread") => options(name, iothread::properties().collect()),
        _ => help_list(
            "List of user creatable objects",
            ["iothread", "throttle-group"],
        ),
    })
}

/// Reads the arguments of `object-add`.
pub(super) fn object_options(mut args: Args) -> Result<ObjectOptions, QmpError> {
    let qom_type = args.required_str("qom-type")?;
    let known = |names: &[&str]| names.contains(&qom_type.as_str());
    let ours = ["throttle-group", "iothread"];
    if !(known(&ours) || known(UNSUPPORTED) || known(NOT_IN_A_STORAGE_DAEMON)) {
        return Err(QmpError::bad_value("qom-type", &qom_type));
    }
    let id = args.required_str("id")?;
    let kind = match qom_type.as_str() {
        "throttle-group" => KindOptions::ThrottleGroup(GroupProperties::read(&mut args)?),
        "iothread" => KindOptions::Iothread(IothreadProperties::read(&mut args)?),
        other if known(UNSUPPORTED) => {
            return Err(QmpError::generic(format!(
                "Objects of type '{other}' are not supported here; there are 'iothread' and \
                 'throttle-group'"
            )));
        }
        other => {
            return Err(QmpError::generic(format!("invalid object type: {other}")));
        }
    };
    args.finish()?;
    Ok(ObjectOptions { id, kind })
}

/// Whether an object may have this name: a letter, then letters, digits, `-`,
/// `.` and `_`.
fn is_identifier(id: &str) -> bool {
    let mut bytes = id.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
}

/// The objects by name. Main thread only.
pub(crate) struct Objects {
    graph: Rc<block::Graph>,
    /// In the order in which they came. Never borrowed across a call out.
    entries: RefCell<Vec<Entry>>,
}

#[derive(Clone)]
struct Entry {
    id: String,
    object: Object,
}

#[derive(Clone)]
enum Object {
    ThrottleGroup(Arc<ThrottleGroup>),
    Iothread(Rc<IothreadObject>),
}

impl Object {
    fn type_name(&self) -> &'static str {
        match self {
            Self::ThrottleGroup(_) => "throttle-group",
            Self::Iothread(_) => "iothread",
        }
    }
}

struct IothreadObject {
    properties: RefCell<IothreadProperties>,
    /// `None` once it is being deleted.
    thread: RefCell<Option<Iothread>>,
    /// Cloned by who uses it.
    users: Arc<()>,
}

/// A user's hold on a named iothread, which cannot be deleted meanwhile.
#[derive(Clone, Debug)]
pub(crate) struct IothreadUse {
    handle: IothreadHandle,
    _hold: Arc<()>,
}

impl Deref for IothreadUse {
    type Target = IothreadHandle;

    fn deref(&self) -> &IothreadHandle {
        &self.handle
    }
}

impl Objects {
    /// No objects yet. Throttle groups are made known to `graph`.
    pub(super) fn new(graph: &Rc<block::Graph>) -> Self {
        Self {
            graph: Rc::clone(graph),
            entries: RefCell::default(),
        }
    }

    fn groups(&self) -> &ThrottleGroups {
        self.graph.throttle_groups()
    }

    /// Makes an object.
    ///
    /// Errors, in QEMU's words: a bad or taken name, properties that make no sense,
    /// no more threads.
    pub(crate) fn add(&self, options: ObjectOptions) -> Result<(), QmpError> {
        let ObjectOptions { id, kind } = options;
        if !is_identifier(&id) {
            return Err(QmpError::expects("id", "an identifier"));
        }
        let object = match kind {
            KindOptions::ThrottleGroup(properties) => {
                let limits = properties.limits()?;
                self.check_new(&id)?;
                let group = self
                    .groups()
                    .create(&id, limits)
                    .map_err(|error| group_error(&id, error))?;
                Object::ThrottleGroup(group)
            }
            KindOptions::Iothread(properties) => {
                properties.check_ranges()?;
                self.check_new(&id)?;
                properties.check()?;
                let thread = Iothread::spawn(&id)
                    .map_err(|error| QmpError::with_causes(super::ErrorClass::Generic, &error))?;
                Object::Iothread(Rc::new(IothreadObject {
                    properties: RefCell::new(properties),
                    thread: RefCell::new(Some(thread)),
                    users: Arc::new(()),
                }))
            }
        };
        self.entries.borrow_mut().push(Entry { id, object });
        Ok(())
    }

    fn check_new(&self, id: &str) -> Result<(), QmpError> {
        // Each object has a property `type`, the one that holds them too.
        match id == "type" || self.find(id).is_some() {
            true => Err(duplicate(id)),
            false => Ok(()),
        }
    }

    /// Deletes an object that nobody uses.
    ///
    /// Cancel: it is deleted all the same.
    pub(crate) async fn del(&self, id: &str) -> Result<(), QmpError> {
        let object = self
            .find(id)
            .ok_or_else(|| QmpError::generic(format!("object '{id}' not found")))?;
        let thread = match object {
            Object::ThrottleGroup(_) => {
                self.groups()
                    .remove(id)
                    .map_err(|error| group_error(id, error))?;
                None
            }
            Object::Iothread(object) => {
                if Arc::strong_count(&object.users) > 1 {
                    return Err(in_use(id));
                }
                object.thread.take()
            }
        };
        self.entries.borrow_mut().retain(|entry| entry.id != id);
        if let Some(thread) = thread {
            // Its end is awaited, and not on main.
            unblock(move || thread.stop()).await;
        }
        Ok(())
    }

    /// The iothread of that name, for an export or a job to be placed on. It cannot
    /// be deleted until what this gives, and all clones of it, are dropped.
    pub(crate) fn iothread(&self, id: &str) -> Option<IothreadUse> {
        let Some(Object::Iothread(object)) = self.find(id) else {
            return None;
        };
        let thread = object.thread.borrow();
        Some(IothreadUse {
            handle: thread.as_ref()?.handle().clone(),
            _hold: Arc::clone(&object.users),
        })
    }

    fn find(&self, id: &str) -> Option<Object> {
        let entries = self.entries.borrow();
        entries
            .iter()
            .find(|entry| entry.id == id)
            .map(|entry| entry.object.clone())
    }
}

fn duplicate(id: &str) -> QmpError {
    QmpError::generic(format!(
        "attempt to add duplicate property '{id}' to object (type 'container')"
    ))
}

fn in_use(id: &str) -> QmpError {
    QmpError::generic(format!("object '{id}' is in use, can not be deleted"))
}

fn group_error(id: &str, error: GroupError) -> QmpError {
    match error {
        GroupError::InUse => in_use(id),
        GroupError::Exists => duplicate(id),
        GroupError::NotFound => QmpError::generic(format!("object '{id}' not found")),
        GroupError::Limits(error) => QmpError::generic(error.to_string()),
    }
}
