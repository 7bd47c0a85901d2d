//! What clients can ask of this program and what they are told, as `query-qmp-schema`
//! shows it.
//!
//! The source is `interface.json`: every command with its arguments and what it returns,
//! every event, and the types they are made of, by names of our own. Tests hold it
//! against the table of commands, the arguments that each of them takes, and the events
//! that there are. What clients see is made from it: names of types are numbers there,
//! so that nobody depends on them.
//!
//! # The file
//!
//! `commands`: `args` (a type, or the members themselves), `returns`, `features`.
//! `events`: `data`, as `args`, and whether there has to be a guest's machine for them.
//! `types`: `enum` with its words; `alternate` with its types; or `members`, and maybe
//! `tag` (the member that chooses) with `variants` (what each of its words adds). A type
//! in brackets is a list of it, `*` in front of a member's name says that it may be left
//! out, and what begins with `x-` is unstable.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::{Map, Value, json};

#[cfg(test)]
mod arguments;
mod help;
#[cfg(test)]
mod tests;

pub(crate) use help::{HelpTopic, help_list, option_help, parts_with_help};

const INTERFACE: &str = include_str!("interface.json");

/// Types that need no definition: name, and the JSON type.
const BUILTINS: &[(&str, &str)] = &[
    ("any", "value"),
    ("bool", "boolean"),
    ("int", "int"),
    ("null", "null"),
    ("str", "string"),
];

/// The whole file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Interface {
    commands: BTreeMap<String, CommandShape>,
    events: BTreeMap<String, EventShape>,
    types: BTreeMap<String, TypeShape>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CommandShape {
    #[serde(default)]
    args: Arguments,
    returns: Option<TypeRef>,
    #[serde(default)]
    features: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct EventShape {
    #[serde(default)]
    data: Arguments,
    /// There only with a guest's machine (`diptych run`).
    #[serde(default)]
    needs_machine: bool,
}

/// What goes with a command or an event: a type, or the members of one without a name.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Arguments {
    Named(String),
    Here(Members),
}

impl Default for Arguments {
    fn default() -> Self {
        Self::Here(Members::new())
    }
}

/// Types by the names of members, those that may be left out with `*` in front.
type Members = BTreeMap<String, TypeRef>;

/// A type, or a list of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
enum TypeRef {
    One(String),
    List([String; 1]),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum TypeShape {
    Enum(EnumShape),
    Alternate(AlternateShape),
    Object(ObjectShape),
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EnumShape {
    #[serde(rename = "enum")]
    words: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct AlternateShape {
    alternate: Vec<String>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ObjectShape {
    members: Members,
    tag: Option<String>,
    #[serde(default)]
    variants: BTreeMap<String, String>,
}

/// The interface of a program that has these commands, as `query-qmp-schema` answers.
///
/// Errors: the file is not what it should be, which the tests would have found.
pub(super) fn introspect<'a>(
    commands: impl Iterator<Item = &'a str>,
    has_machine: bool,
) -> Result<Value, serde_json::Error> {
    let interface = Interface::load()?;
    let mut masks = Masks::new(&interface);
    let mut rows = Vec::new();
    for name in commands {
        if let Some(shape) = interface.commands.get(name) {
            rows.push(masks.command(name, shape));
        }
    }
    for (name, shape) in &interface.events {
        if has_machine || !shape.needs_machine {
            let arguments = masks.arguments(&shape.data);
            rows.push(json!({"name": name, "meta-type": "event", "arg-type": arguments}));
        }
    }
    rows.extend(masks.into_types());
    Ok(rows.into())
}

impl Interface {
    fn load() -> Result<Self, serde_json::Error> {
        serde_json::from_str(INTERFACE)
    }
}

/// A member's name, and whether it may be left out.
fn member_name(name: &str) -> (&str, bool) {
    match name.strip_prefix('*') {
        Some(name) => (name, true),
        None => (name, false),
    }
}

/// Types as they are met, each with its number.
struct Masks<'a> {
    interface: &'a Interface,
    /// By our names; those of members without a name are not here.
    numbers: HashMap<String, usize>,
    /// By their numbers; `None` while they are being looked at.
    types: Vec<Option<Value>>,
    /// Those that need no number, by what clients see.
    others: BTreeMap<String, Value>,
}

impl<'a> Masks<'a> {
    fn new(interface: &'a Interface) -> Self {
        let mut masks = Self {
            interface,
            numbers: HashMap::new(),
            types: Vec::new(),
            others: BTreeMap::new(),
        };
        // What is empty has the first number, as in QEMU.
        masks.add_object(&ObjectShape::default());
        masks
    }

    fn command(&mut self, name: &str, shape: &CommandShape) -> Value {
        let mut row = json!({
            "name": name,
            "meta-type": "command",
            "arg-type": self.arguments(&shape.args),
            "ret-type": match &shape.returns {
                Some(kind) => self.reference(kind),
                None => "0".to_owned(),
            },
        });
        set_features(&mut row, features_of(name, &shape.features));
        row
    }

    fn arguments(&mut self, arguments: &Arguments) -> String {
        match arguments {
            Arguments::Named(name) => self.name(name),
            Arguments::Here(members) if members.is_empty() => "0".to_owned(),
            Arguments::Here(members) => self.add_object(&ObjectShape {
                members: members.clone(),
                ..ObjectShape::default()
            }),
        }
    }

    fn reference(&mut self, kind: &TypeRef) -> String {
        match kind {
            TypeRef::One(name) => self.name(name),
            TypeRef::List([name]) => {
                let element = self.name(name);
                let list = format!("[{element}]");
                let row = json!({"name": list, "meta-type": "array", "element-type": element});
                self.others.insert(list.clone(), row);
                list
            }
        }
    }

    /// What clients see in place of the name of a type.
    fn name(&mut self, name: &str) -> String {
        if let Some((name, kind)) = BUILTINS.iter().find(|(known, _)| *known == name) {
            let row = json!({"name": name, "meta-type": "builtin", "json-type": kind});
            self.others.insert((*name).to_owned(), row);
            return (*name).to_owned();
        }
        if let Some(number) = self.numbers.get(name) {
            return number.to_string();
        }
        let interface = self.interface;
        let number = self.reserve();
        self.numbers.insert(name.to_owned(), number);
        let row = match interface.types.get(name) {
            Some(TypeShape::Enum(shape)) => enumeration(number, shape),
            Some(TypeShape::Alternate(shape)) => {
                let members = shape.alternate.iter().map(|name| self.name(name));
                let members = members.map(|name| json!({"type": name}));
                json!({
                    "name": number.to_string(),
                    "meta-type": "alternate",
                    "members": members.collect::<Value>(),
                })
            }
            Some(TypeShape::Object(shape)) => self.object(number, shape),
            // The tests look for names without a type.
            None => self.object(number, &ObjectShape::default()),
        };
        self.types[number] = Some(row);
        number.to_string()
    }

    fn reserve(&mut self) -> usize {
        self.types.push(None);
        self.types.len() - 1
    }

    fn add_object(&mut self, shape: &ObjectShape) -> String {
        let number = self.reserve();
        let row = self.object(number, shape);
        self.types[number] = Some(row);
        number.to_string()
    }

    fn object(&mut self, number: usize, shape: &ObjectShape) -> Value {
        let members = shape.members.iter().map(|(name, kind)| {
            let (name, is_optional) = member_name(name);
            let mut row = json!({"name": name, "type": self.reference(kind)});
            if is_optional {
                row["default"] = Value::Null;
            }
            set_features(&mut row, features_of(name, &[]));
            row
        });
        let mut row = json!({
            "name": number.to_string(),
            "meta-type": "object",
            "members": members.collect::<Value>(),
        });
        if let Some(tag) = &shape.tag {
            let variants = shape.variants.iter();
            let variants = variants.map(|(case, kind)| {
                let kind = self.name(kind);
                json!({"case": case, "type": kind})
            });
            row["variants"] = variants.collect();
            row["tag"] = Value::from(tag.as_str());
        }
        row
    }

    fn into_types(self) -> impl Iterator<Item = Value> {
        let others = self.others.into_values();
        self.types.into_iter().flatten().chain(others)
    }
}

fn enumeration(number: usize, shape: &EnumShape) -> Value {
    let members = shape.words.iter().map(|word| json!({"name": word}));
    json!({
        "name": number.to_string(),
        "meta-type": "enum",
        "members": members.collect::<Value>(),
        // The older form.
        "values": shape.words,
    })
}

/// What is known of a name beside its type.
fn features_of<'a>(name: &str, given: &'a [String]) -> Vec<&'a str> {
    let unstable = name.starts_with("x-").then_some("unstable");
    given.iter().map(String::as_str).chain(unstable).collect()
}

fn set_features(row: &mut Value, features: Vec<&str>) {
    if let Value::Object(row) = row
        && !features.is_empty()
    {
        let _: Option<Value> = Map::insert(row, "features".to_owned(), features.into());
    }
}
