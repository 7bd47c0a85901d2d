//! Objects by path: `qom-get`, `qom-set`, `qom-list` and the types there are.
//!
//! The tree is `/`, `/objects`, and in it the objects that users made; with a guest,
//! also what `devices` has. A path without a slash at its start is the end of one.

use super::*;

/// What a path leads to.
enum Found {
    Root,
    Container,
    Object(Object),
}

/// Why a path leads nowhere.
enum NotFound {
    Nothing,
    Ambiguous,
}

/// A type of object, as `qom-list-types` shows it.
struct Type {
    name: &'static str,
    parent: &'static str,
    is_abstract: bool,
    /// What it is as well, beside itself and `object`.
    implements: &'static [&'static str],
}

const TYPES: &[Type] = &[
    Type {
        name: "container",
        parent: "object",
        is_abstract: false,
        implements: &[],
    },
    Type {
        name: "iothread",
        parent: "event-loop-base",
        is_abstract: false,
        implements: &["event-loop-base", "user-creatable"],
    },
    Type {
        name: "event-loop-base",
        parent: "object",
        is_abstract: true,
        implements: &["user-creatable"],
    },
    Type {
        name: "user-creatable",
        parent: "interface",
        is_abstract: true,
        implements: &["interface"],
    },
    Type {
        name: "throttle-group",
        parent: "object",
        is_abstract: false,
        implements: &["user-creatable"],
    },
    Type {
        name: devices::TYPE,
        parent: "virtio-device",
        is_abstract: false,
        implements: &["virtio-device", "device"],
    },
    Type {
        name: "virtio-device",
        parent: "device",
        is_abstract: true,
        implements: &["device"],
    },
    Type {
        name: "device",
        parent: "object",
        is_abstract: true,
        implements: &[],
    },
];

/// `qom-list-types`.
pub(in super::super) fn type_names(implements: Option<&str>, with_abstract: bool) -> Value {
    TYPES
        .iter()
        .filter(|kind| with_abstract || !kind.is_abstract)
        .filter(|kind| {
            implements.is_none_or(|wanted| {
                wanted == kind.name || wanted == "object" || kind.implements.contains(&wanted)
            })
        })
        .map(|kind| {
            let mut row = json!({"name": kind.name, "parent": kind.parent});
            if kind.is_abstract {
                row["abstract"] = true.into();
            }
            row
        })
        .collect()
}

pub(super) fn property_rows(
    properties: impl Iterator<Item = (&'static str, &'static str)>,
) -> impl Iterator<Item = Value> {
    std::iter::once(("type", "string"))
        .chain(properties)
        .map(|(name, kind)| json!({"name": name, "type": kind}))
}

/// `qom-list-properties`.
pub(in super::super) fn type_properties(name: &str) -> Result<Value, QmpError> {
    match name {
        devices::TYPE => Ok(property_rows(devices::properties()).collect()),
        "throttle-group" => Ok(property_rows(throttle_group::properties()).collect()),
        "iothread" => Ok(property_rows(iothread::properties()).collect()),
        "event-loop-base" => {
            let base = iothread::properties().filter(|(name, _)| !name.starts_with("poll-"));
            Ok(property_rows(base).collect())
        }
        "container" | "device" | "object" | "virtio-device" => {
            Ok(property_rows(std::iter::empty()).collect())
        }
        "interface" | "user-creatable" => Err(QmpError::expects("typename", "a QOM type")),
        _ => Err(QmpError::device_not_found(&format!("Class '{name}'"))),
    }
}

fn no_device(path: &str) -> QmpError {
    QmpError::device_not_found(&format!("Device '{path}'"))
}

pub(super) fn no_property(kind: &str, property: &str) -> QmpError {
    QmpError::generic(format!("Property '{kind}.{property}' not found"))
}

pub(super) fn read_only(kind: &str, property: &str) -> QmpError {
    QmpError::generic(format!("Property '{kind}.{property}' is not writable"))
}

impl Objects {
    fn resolve(&self, path: &str) -> Result<Found, NotFound> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let object = |id: &str| self.find(id).map(Found::Object).ok_or(NotFound::Nothing);
        match (path.starts_with('/'), parts.as_slice()) {
            (true, []) => Ok(Found::Root),
            // An end of every path.
            (false, []) => Err(NotFound::Ambiguous),
            (false, ["objects"]) if self.find("objects").is_some() => Err(NotFound::Ambiguous),
            (_, ["objects"]) => Ok(Found::Container),
            (_, ["objects", id]) => object(id),
            (false, [id]) => object(id),
            _ => Err(NotFound::Nothing),
        }
    }

    /// Whether the path leads to an object here, or to several.
    pub(in super::super) fn has(&self, path: &str) -> bool {
        !matches!(self.resolve(path), Err(NotFound::Nothing))
    }

    /// `qom-get`.
    pub(in super::super) fn property(&self, path: &str, name: &str) -> Result<Value, QmpError> {
        let found = self.resolve(path).map_err(|_| no_device(path))?;
        let kind = match &found {
            Found::Root | Found::Container => "container",
            Found::Object(object) => object.type_name(),
        };
        if name == "type" {
            return Ok(kind.into());
        }
        let value = match found {
            Found::Root => (name == "objects").then(|| Value::from("/objects")),
            Found::Container => self.find(name).map(|_| format!("/objects/{name}").into()),
            Found::Object(Object::ThrottleGroup(group)) => throttle_group::property(&group, name),
            Found::Object(Object::Iothread(object)) => object.properties.borrow().property(name),
        };
        value.ok_or_else(|| no_property(kind, name))
    }

    /// `qom-set`.
    pub(in super::super) fn set_property(
        &self,
        path: &str,
        name: &str,
        value: Value,
    ) -> Result<(), QmpError> {
        let object = match self.resolve(path).map_err(|_| no_device(path))? {
            Found::Object(object) => object,
            Found::Root | Found::Container => {
                self.property(path, name)?;
                return Err(read_only("container", name));
            }
        };
        let kind = object.type_name();
        if name == "type" {
            return Err(read_only(kind, name));
        }
        let set = match object {
            Object::ThrottleGroup(group) => throttle_group::set_property(&group, name, value),
            Object::Iothread(object) => object.properties.borrow_mut().set_property(name, value),
        };
        set.unwrap_or_else(|| Err(no_property(kind, name)))
    }

    /// `qom-list`.
    pub(in super::super) fn list(&self, path: &str, with_machine: bool) -> Result<Value, QmpError> {
        let found = self.resolve(path).map_err(|error| match error {
            NotFound::Nothing => no_device(path),
            NotFound::Ambiguous => QmpError::generic(format!("Path '{path}' is ambiguous")),
        })?;
        Ok(match found {
            Found::Root => {
                let machine = with_machine.then_some(("machine", "child<container>"));
                let children = [("objects", "child<container>")].into_iter().chain(machine);
                property_rows(children).collect()
            }
            Found::Container => {
                let children = self.entries.borrow().clone().into_iter().map(|entry| {
                    let kind = format!("child<{}>", entry.object.type_name());
                    json!({"name": entry.id, "type": kind})
                });
                property_rows(std::iter::empty()).chain(children).collect()
            }
            Found::Object(object) => type_properties(object.type_name())?,
        })
    }
}
