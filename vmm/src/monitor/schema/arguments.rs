//! Arguments made up from the description of the interface: enough of them that each
//! member, each word and each choice comes at least once.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Arguments, Interface, Members, ObjectShape, TypeRef, TypeShape, member_name};

/// A text that names nothing, that no file can have as its name, and no port either.
const NOTHING: &str = "/dev/null/none";

/// An address that is there without asking anybody for it.
const HOST: &str = "127.0.0.1";

/// A value, and the type that each path in it has by the description.
#[derive(Clone, Debug)]
pub(super) struct Example {
    pub(super) value: Value,
    pub(super) kinds: BTreeMap<String, TypeRef>,
}

impl Example {
    fn of(value: Value) -> Self {
        Self {
            value,
            kinds: BTreeMap::new(),
        }
    }
}

impl Interface {
    /// The members that go with a command or an event, and what its tag adds.
    pub(super) fn object(&self, arguments: &Arguments) -> Option<ObjectShape> {
        match arguments {
            Arguments::Here(members) => Some(ObjectShape {
                members: members.clone(),
                ..ObjectShape::default()
            }),
            Arguments::Named(name) => match self.types.get(name)? {
                TypeShape::Object(shape) => Some(shape.clone()),
                _ => None,
            },
        }
    }

    /// Arguments of a command.
    pub(super) fn examples(&self, arguments: &Arguments) -> Vec<Example> {
        let shape = self.object(arguments).expect("arguments are objects");
        let depth = match arguments {
            Arguments::Here(_) => 0,
            Arguments::Named(_) => 1,
        };
        self.objects(&shape, "", depth)
    }

    fn objects(&self, shape: &ObjectShape, path: &str, depth: usize) -> Vec<Example> {
        let Some(tag) = &shape.tag else {
            return self.members(&shape.members, path, depth);
        };
        let mut examples = Vec::new();
        for (case, variant) in &shape.variants {
            let mut members = shape.members.clone();
            let TypeShape::Object(more) = &self.types[variant] else {
                panic!("variant {variant} is no object");
            };
            members.extend(more.members.clone());
            let mut all = self.members(&members, path, depth);
            for example in &mut all {
                example.value[tag] = Value::from(case.as_str());
            }
            examples.extend(all);
        }
        examples
    }

    /// As many as the member with most choices has, not their product.
    fn members(&self, members: &Members, path: &str, depth: usize) -> Vec<Example> {
        let columns = members.iter().map(|(name, kind)| {
            let (name, _) = member_name(name);
            let path = format!("{path}{name}");
            let mut values = self.values(kind, &path, depth);
            if name == "host" {
                values = vec![Example::of(json!(HOST))];
            }
            for value in &mut values {
                value.kinds.insert(path.clone(), kind.clone());
            }
            (name, values)
        });
        let columns: Vec<_> = columns.collect();
        let rows = columns.iter().map(|(_, values)| values.len()).max();
        let row = |index: usize| {
            let mut example = Example::of(Value::Object(Map::new()));
            for (name, values) in &columns {
                let chosen = &values[index.min(values.len() - 1)];
                example.value[*name] = chosen.value.clone();
                example.kinds.extend(chosen.kinds.clone());
            }
            example
        };
        (0..rows.unwrap_or(1)).map(row).collect()
    }

    fn values(&self, kind: &TypeRef, path: &str, depth: usize) -> Vec<Example> {
        match kind {
            TypeRef::One(name) => self.named(name, path, depth),
            TypeRef::List([name]) => {
                let mut values = self.named(name, &format!("{path}[0]"), depth);
                for example in &mut values {
                    example.value = json!([example.value]);
                }
                values
            }
        }
    }

    fn named(&self, name: &str, path: &str, depth: usize) -> Vec<Example> {
        match name {
            "str" | "any" => return vec![Example::of(json!(NOTHING))],
            "int" => return vec![Example::of(json!(1))],
            "bool" => return vec![Example::of(json!(false))],
            "null" => return vec![Example::of(Value::Null)],
            _ => (),
        }
        match &self.types[name] {
            TypeShape::Enum(shape) => {
                let words = shape.words.iter();
                words.map(|word| Example::of(json!(word))).collect()
            }
            TypeShape::Alternate(shape) => {
                let each = shape.alternate.iter();
                each.flat_map(|name| self.named(name, path, depth))
                    .collect()
            }
            TypeShape::Object(shape) => {
                let mut shape = shape.clone();
                if name == "Blockdev" && depth > 0 {
                    // It may hold itself: once is enough.
                    shape.variants.retain(|case, _| case == "null-co");
                }
                let mut all = self.objects(&shape, &format!("{path}."), depth + 1);
                if name == "Blockdev" && depth > 0 {
                    all.truncate(1);
                }
                all
            }
        }
    }
}
