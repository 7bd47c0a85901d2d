use std::collections::BTreeSet;
use std::rc::Rc;

use block::Graph;
use block::runtime::EventLoop;
use jobs::{BlockJobProgress, Jobs};

use super::*;
use crate::monitor::args::Args;
use crate::monitor::args::taken::{self, Kind};
use crate::monitor::session::Session;
use crate::monitor::tests::machine::machine;
use crate::monitor::{Event, Monitor, commands, events};
use crate::vm_control::{RunState, ShutdownCause, VmEvent};

/// What is read only to be refused whatever it says, by the ends of paths: clients that
/// look for it shall not find it.
const REFUSED: &[&str] = &["encrypt", "mptcp", "pr-manager", "tls-authz", "tls-creds"];

/// Words that are refused always, or have no meaning where they are.
const REFUSED_WORDS: &[(&str, &[&str])] = &[
    // Addresses of other kinds.
    ("addr.type", &["fd", "vsock"]),
    ("server.type", &["fd", "vsock"]),
    // block-job-change: jobs in which there is nothing to change.
    ("type", &["amend", "backup", "commit", "create", "stream"]),
];

fn interface() -> Interface {
    Interface::load().unwrap()
}

fn on_main<F: Future>(test: impl FnOnce() -> F) -> F::Output {
    EventLoop::new("main")
        .unwrap()
        .block_on(async { test().await })
}

/// A monitor with a machine, so that it has all commands.
fn monitor() -> Rc<Monitor> {
    let graph = Graph::new();
    let monitor = Monitor::new(&graph, &Jobs::new(graph.handle()));
    monitor.set_machine(Rc::new(machine(&monitor, RunState::Running)));
    monitor
}

#[test]
fn the_interface_describes_the_commands_that_there_are() {
    let names = on_main(async || commands::names(&monitor()));
    let described: Vec<String> = interface().commands.into_keys().collect();
    assert_eq!(described, names, "schema/interface.json and COMMANDS");
}

#[test]
fn every_type_is_there_and_used_and_tags_have_all_their_variants() {
    let interface = interface();
    let mut used = BTreeSet::new();
    let mut members = |members: &Members| {
        for kind in members.values() {
            let (TypeRef::One(name) | TypeRef::List([name])) = kind;
            used.insert(name.clone());
        }
    };
    let mut named = Vec::new();
    let arguments = interface.commands.values().map(|command| &command.args);
    for arguments in arguments.chain(interface.events.values().map(|event| &event.data)) {
        match arguments {
            Arguments::Named(name) => named.push(name.clone()),
            Arguments::Here(shape) => members(shape),
        }
        assert!(interface.object(arguments).is_some(), "{arguments:?}");
    }
    let returns = interface.commands.values();
    for kind in returns.filter_map(|command| command.returns.clone()) {
        members(&Members::from([(String::new(), kind)]));
    }
    for (name, shape) in &interface.types {
        match shape {
            TypeShape::Enum(shape) => assert!(!shape.words.is_empty(), "{name}"),
            TypeShape::Alternate(shape) => named.extend(shape.alternate.clone()),
            TypeShape::Object(shape) => {
                members(&shape.members);
                named.extend(shape.variants.values().cloned());
                check_variants(&interface, name, shape);
            }
        }
    }
    used.extend(named);
    used.retain(|name| !BUILTINS.iter().any(|(known, _)| known == name));
    let there: BTreeSet<_> = interface.types.into_keys().collect();
    assert_eq!(used, there);
}

fn check_variants(interface: &Interface, name: &str, shape: &ObjectShape) {
    let Some(tag) = &shape.tag else {
        return assert!(shape.variants.is_empty(), "{name}");
    };
    let TypeRef::One(kind) = &shape.members[tag] else {
        panic!("the tag of {name} is a list");
    };
    let TypeShape::Enum(words) = &interface.types[kind] else {
        panic!("the tag of {name} is no enum");
    };
    let words: BTreeSet<_> = words.words.iter().collect();
    assert_eq!(words, shape.variants.keys().collect(), "{name}");
    for variant in shape.variants.values() {
        let TypeShape::Object(variant) = &interface.types[variant] else {
            panic!("a variant of {name} is no object");
        };
        assert!(variant.tag.is_none(), "a variant of {name}");
        for member in variant.members.keys() {
            assert!(!shape.members.contains_key(member), "{name}.{member}");
        }
    }
}

#[test]
fn commands_take_the_arguments_that_the_interface_says_and_no_others() {
    let interface = interface();
    for (name, command) in &interface.commands {
        for example in interface.examples(&command.args) {
            let value = &example.value;
            let Value::Object(members) = value.clone() else {
                panic!("{name}: {value}");
            };
            taken::record();
            let result = on_main(async || {
                let monitor = monitor();
                let session = Session::default();
                let args = Args::new(members);
                if name == commands::NEGOTIATE {
                    session.run(&monitor, name, args).await
                } else {
                    commands::start(&monitor, name, args)?.await
                }
            });
            let taken = taken::record();
            assert!(taken.all, "{name} {value}: {result:?}");
            for (path, kind) in &example.kinds {
                let found = taken.kinds.get(path);
                let found = found.unwrap_or_else(|| panic!("{name} does not know {path}: {value}"));
                check_kind(&interface, name, path, kind, found);
            }
            for path in taken.kinds.keys() {
                let last = path.rsplit('.').next().unwrap();
                assert!(
                    example.kinds.contains_key(path) || REFUSED.contains(&last),
                    "{name} takes {path}, of which the interface does not know: {value}"
                );
            }
        }
    }
}

/// Whether what a command takes is what the interface says.
fn check_kind(interface: &Interface, command: &str, path: &str, kind: &TypeRef, taken: &Kind) {
    let shape = match kind {
        TypeRef::One(name) | TypeRef::List([name]) => interface.types.get(name),
    };
    let agrees = match (kind, taken) {
        (TypeRef::One(_), Kind::Words(words)) | (TypeRef::List(_), Kind::ListOfWords(words)) => {
            let Some(TypeShape::Enum(shape)) = shape else {
                panic!("{command}: {path} is one of {words:?}");
            };
            let refused = |word: &String| {
                let mut refused = REFUSED_WORDS.iter();
                refused.any(|(end, words)| path.ends_with(end) && words.contains(&&**word))
            };
            let known: BTreeSet<_> = shape.words.iter().collect();
            let words = words.iter().filter(|word| !refused(word));
            assert_eq!(known, words.collect(), "{command}: {path}");
            true
        }
        // The examples try each word.
        (TypeRef::One(_), Kind::Str) if matches!(shape, Some(TypeShape::Enum(_))) => true,
        (TypeRef::List(_), taken) => *taken == Kind::List,
        (TypeRef::One(name), taken) => match (name.as_str(), shape) {
            ("str", _) => *taken == Kind::Str,
            ("int", _) => *taken == Kind::Int,
            ("bool", _) => *taken == Kind::Bool,
            ("any", _) => *taken == Kind::Any,
            (_, Some(TypeShape::Object(_))) => *taken == Kind::Object,
            (_, Some(TypeShape::Alternate(_))) => *taken == Kind::StringOrObject,
            _ => false,
        },
    };
    assert!(
        agrees,
        "{command}: {path} is {kind:?}, and {taken:?} is taken"
    );
}

/// Whether `value` is of a type.
fn conforms(interface: &Interface, kind: &TypeRef, value: &Value) -> bool {
    let name = match kind {
        TypeRef::One(name) => name,
        TypeRef::List([name]) => {
            let kind = TypeRef::One(name.clone());
            let elements = value.as_array();
            return elements.is_some_and(|all| all.iter().all(|v| conforms(interface, &kind, v)));
        }
    };
    match (name.as_str(), interface.types.get(name)) {
        ("str", _) => value.is_string(),
        ("int", _) => value.is_u64() || value.is_i64(),
        ("bool", _) => value.is_boolean(),
        (_, Some(TypeShape::Enum(shape))) => {
            shape.words.iter().any(|word| value.as_str() == Some(word))
        }
        (_, Some(TypeShape::Object(shape))) => conforms_to(interface, shape, value),
        _ => false,
    }
}

fn conforms_to(interface: &Interface, shape: &ObjectShape, value: &Value) -> bool {
    let Some(value) = value.as_object() else {
        return false;
    };
    let names: BTreeSet<&str> = shape
        .members
        .keys()
        .map(|name| member_name(name).0)
        .collect();
    let is_right = |(name, kind): (&String, &TypeRef)| {
        let (name, is_optional) = member_name(name);
        match value.get(name) {
            None => is_optional,
            Some(value) => conforms(interface, kind, value),
        }
    };
    value.keys().all(|name| names.contains(name.as_str())) && shape.members.iter().all(is_right)
}

#[test]
fn the_interface_describes_the_events_that_there_are() {
    let interface = interface();
    let progress = BlockJobProgress {
        len: 10,
        offset: 5,
        speed: 7,
    };
    let mut all: Vec<Event> = events::tests::one_of_each_kind(progress)
        .iter()
        .map(Event::of_job)
        .collect();
    all.push(Event::of_deleted_export("e"));
    all.push(Event::of_write_threshold("n", 1, 2));
    let machine = [
        VmEvent::Stop,
        VmEvent::Resume,
        VmEvent::Reset(ShutdownCause::GuestReset),
        VmEvent::Shutdown(ShutdownCause::HostSignal),
    ];
    all.extend(machine.map(|event| Event::now(event.name(), event.data())));
    let mut seen = BTreeSet::new();
    for event in &all {
        let (name, data) = event.parts();
        let shape = &interface
            .events
            .get(name)
            .unwrap_or_else(|| panic!("{name}"));
        let shape = interface.object(&shape.data).unwrap();
        let data = data.cloned().unwrap_or_else(|| json!({}));
        assert!(conforms_to(&interface, &shape, &data), "{name}: {data}");
        seen.insert(name);
    }
    let described: BTreeSet<&str> = interface.events.keys().map(String::as_str).collect();
    assert_eq!(described, seen);
}

#[test]
fn clients_see_types_by_numbers_each_of_them_once_and_used() {
    let interface = interface();
    let rows = introspect(interface.commands.keys().map(String::as_str), true).unwrap();
    let mut names = BTreeSet::new();
    let mut used = BTreeSet::new();
    for row in rows.as_array().unwrap() {
        let name = row["name"].as_str().unwrap();
        assert!(names.insert(name), "{name} twice");
        let is_type = !["command", "event"].contains(&row["meta-type"].as_str().unwrap());
        let is_masked = name.trim_matches(['[', ']']).parse::<usize>().is_ok();
        let is_builtin = BUILTINS
            .iter()
            .any(|(known, _)| name.trim_matches(['[', ']']) == *known);
        assert_eq!(is_type, is_masked || is_builtin, "{row}");
        for key in ["arg-type", "ret-type", "element-type"] {
            used.extend(row[key].as_str());
        }
        for (key, kind) in [("members", "type"), ("variants", "type")] {
            let inner = row[key].as_array().into_iter().flatten();
            used.extend(inner.filter_map(|member| member[kind].as_str()));
        }
    }
    let types = names.iter().filter(|name| used.contains(**name)).count();
    assert_eq!(used.len(), types, "{:?}", used.difference(&names));
    let untold = names.len() - types;
    assert_eq!(untold, interface.commands.len() + interface.events.len());
}

#[test]
fn what_needs_a_machine_is_not_shown_without_one() {
    let rows = introspect(["quit"].into_iter(), false).unwrap();
    let named = |name: &str| {
        rows.as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name)
    };
    assert_eq!(
        named("quit"),
        Some(&json!({"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "0"}))
    );
    assert_eq!(named("0").unwrap()["members"], json!([]));
    assert!(named("JOB_STATUS_CHANGE").is_some());
    assert!(named("RESUME").is_none());
    assert!(named("blockdev-add").is_none());
}

#[test]
fn unstable_and_deprecated_names_are_marked() {
    let interface = interface();
    let rows = introspect(interface.commands.keys().map(String::as_str), true).unwrap();
    let features = |name: &str| {
        let row = rows
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name);
        row.unwrap()["features"].clone()
    };
    assert_eq!(features("x-debug-query-block-graph"), json!(["unstable"]));
    assert_eq!(features("drive-backup"), json!(["deprecated"]));
    assert_eq!(features("quit"), Value::Null);
}
