//! What options of the command line take that are arguments of commands: made from the
//! description of the interface, so that it cannot say anything else.

use std::fmt;

use super::{Interface, Members, ObjectShape, TypeRef, TypeShape, member_name};

/// Words of a type that are listed one by one.
const FEW_WORDS: usize = 8;

/// What an option makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HelpTopic {
    /// `--blockdev`
    Blockdev,
    /// `--export`
    Export,
    /// `--nbd-server`
    NbdServer,
}

/// What `OPTION help` and `OPTION KIND,help` tell; `None`: no help is asked for.
pub(crate) fn option_help(topic: HelpTopic, text: &str) -> Option<String> {
    let parts = parts_with_help(text)?;
    // The tests load it.
    let interface = Interface::load().ok()?;
    let (title, name) = match topic {
        HelpTopic::Blockdev => ("Drivers", "Blockdev"),
        HelpTopic::Export => ("Types of exports", "Export"),
        HelpTopic::NbdServer => return Some(interface.nbd_server_options()),
    };
    let shape = interface.shape(name)?;
    let tag = shape.tag.as_deref()?;
    let kind = parts.iter().find_map(|part| match part.split_once('=') {
        Some((key, word)) => (key == tag).then_some(word),
        // The first one may do without its key.
        None => Some(*part).filter(|word| *word == parts[0]),
    });
    let variant = kind.and_then(|kind| Some((kind, shape.variants.get(kind)?)));
    let Some((kind, variant)) = variant else {
        let words = shape.variants.keys().map(String::as_str);
        let rest = format!("{tag}=KIND,help tells what one of them takes");
        return Some(format!("{}{rest}\n", help_list(title, words)));
    };
    let mut rows = Vec::new();
    let common = shape.members.iter().filter(|(name, _)| *name != tag);
    interface.option_rows(&mut rows, common, "", Need::REQUIRED);
    if let Some(variant) = interface.shape(variant) {
        interface.option_rows(&mut rows, &variant.members, "", Need::REQUIRED);
    }
    rows.sort_unstable();
    let rows = rows.iter().map(String::as_str);
    Some(help_list(&format!("{kind} options"), rows))
}

/// The parts of `key=value,…` if one of them is `help`, or `?`; a doubled comma separates
/// nothing.
pub(crate) fn parts_with_help(text: &str) -> Option<Vec<&str>> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut commas = text.match_indices(',').map(|(at, _)| at).peekable();
    while let Some(at) = commas.next() {
        if commas.next_if_eq(&(at + 1)).is_none() {
            parts.push(&text[start..at]);
            start = at + 1;
        }
    }
    parts.push(&text[start..]);
    let is_asked_for = parts.iter().any(|part| ["help", "?"].contains(part));
    (is_asked_for && !text.trim_start().starts_with('{')).then_some(parts)
}

/// A title, and a line for each row.
pub(crate) fn help_list<'a>(title: &str, rows: impl IntoIterator<Item = &'a str>) -> String {
    let rows = rows.into_iter().map(|row| format!("  {row}\n"));
    format!("{title}:\n{}", rows.collect::<String>())
}

impl Interface {
    fn shape(&self, name: &str) -> Option<&ObjectShape> {
        match self.types.get(name)? {
            TypeShape::Object(shape) => Some(shape),
            _ => None,
        }
    }

    /// The command line says an address without the `data` of `nbd-server-start`.
    fn nbd_server_options(&self) -> String {
        let one = |name: &str| TypeRef::One(name.to_owned());
        let members = Members::from([
            ("addr".to_owned(), one("SocketAddress")),
            ("*max-connections".to_owned(), one("int")),
        ]);
        let mut rows = Vec::new();
        self.option_rows(&mut rows, &members, "", Need::REQUIRED);
        rows.sort_unstable();
        help_list("nbd-server options", rows.iter().map(String::as_str))
    }

    /// A row for each option.
    fn option_rows<'a>(
        &self,
        rows: &mut Vec<String>,
        members: impl IntoIterator<Item = (&'a String, &'a TypeRef)>,
        prefix: &str,
        need: Need<'_>,
    ) {
        for (name, kind) in members {
            let (name, is_optional) = member_name(name);
            let need = Need {
                is_required: need.is_required && !is_optional,
                ..need
            };
            self.option_row(rows, &format!("{prefix}{name}"), kind, need);
        }
    }

    fn option_row(&self, rows: &mut Vec<String>, name: &str, kind: &TypeRef, need: Need<'_>) {
        let kind = match kind {
            TypeRef::One(kind) => kind,
            TypeRef::List([kind]) => {
                let kind = TypeRef::One(kind.clone());
                return self.option_row(rows, &format!("{name}.0"), &kind, need);
            }
        };
        match self.types.get(kind) {
            None => {
                let kind = match kind.as_str() {
                    // It cannot be said here.
                    "null" => return,
                    "bool" => "bool (on/off)",
                    kind => kind,
                };
                rows.push(format!("{name}=<{kind}>{need}"));
            }
            Some(TypeShape::Enum(shape)) => {
                let words = match shape.words.len() <= FEW_WORDS {
                    true => shape.words.join("|"),
                    false => "str".to_owned(),
                };
                rows.push(format!("{name}=<{words}>{need}"));
            }
            Some(TypeShape::Alternate(shape)) => {
                let mut shapes = shape.alternate.iter().filter_map(|kind| self.shape(kind));
                match shapes.find_map(|shape| shape.tag.as_ref()) {
                    // What is nested has members of this kind again.
                    Some(tag) => rows.push(format!(
                        "{name}=<str>, or {name}.{tag}=<str> and what that takes{need}"
                    )),
                    None => {
                        for kind in &shape.alternate {
                            self.option_row(rows, name, &TypeRef::One(kind.clone()), need);
                        }
                    }
                }
            }
            Some(TypeShape::Object(shape)) => {
                let prefix = format!("{name}.");
                self.option_rows(rows, &shape.members, &prefix, need);
                let tag = shape.tag.as_deref().unwrap_or_default();
                for (word, variant) in &shape.variants {
                    let members = self.shape(variant).map(|shape| &shape.members);
                    let condition = format!("{prefix}{tag}={word}");
                    let need = Need {
                        condition: &condition,
                        ..need
                    };
                    self.option_rows(rows, members.into_iter().flatten(), &prefix, need);
                }
            }
        }
    }
}

/// Whether an option has to be given, and with what other one it goes.
#[derive(Clone, Copy, Debug)]
struct Need<'a> {
    is_required: bool,
    /// Empty: with any.
    condition: &'a str,
}

impl Need<'_> {
    const REQUIRED: Self = Self {
        is_required: true,
        condition: "",
    };
}

impl fmt::Display for Need<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.is_required, self.condition) {
            (false, "") => Ok(()),
            (true, "") => f.write_str(" (required)"),
            (false, condition) => write!(f, " (with {condition})"),
            (true, condition) => write!(f, " (required with {condition})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn help(topic: HelpTopic, text: &str) -> String {
        option_help(topic, text).expect("help is asked for")
    }

    #[test]
    fn help_is_asked_for_by_a_part_of_its_own() {
        for text in ["help", "?", "raw,help", "a=b,,c,help", "help,x=y"] {
            assert!(parts_with_help(text).is_some(), "{text}");
        }
        for text in [
            "",
            "raw",
            "helper",
            "driver=help",
            "filename=a,,help",
            "{\"a\": 1,help",
            "x,,,,help",
        ] {
            assert_eq!(parts_with_help(text), None, "{text}");
        }
        assert_eq!(
            parts_with_help("a=b,,c,?"),
            Some(Vec::from(["a=b,,c", "?"]))
        );
    }

    #[test]
    fn every_kind_is_listed_and_tells_what_it_takes() {
        let interface = Interface::load().unwrap();
        for (topic, name) in [
            (HelpTopic::Blockdev, "Blockdev"),
            (HelpTopic::Export, "Export"),
        ] {
            let all = help(topic, "help");
            let shape = interface.shape(name).unwrap();
            let tag = shape.tag.as_ref().unwrap();
            for word in shape.variants.keys() {
                assert!(all.contains(&format!("  {word}\n")), "{all}");
                for text in [
                    format!("{word},help"),
                    format!("node-name=a,{tag}={word},?"),
                ] {
                    let one = help(topic, &text);
                    assert!(one.starts_with(&format!("{word} options:\n  ")), "{one}");
                }
            }
            assert_eq!(help(topic, "nope,help"), all);
        }
    }

    #[test]
    fn options_are_said_as_they_are_to_be_given() {
        let raw = help(HelpTopic::Blockdev, "raw,help");
        for row in [
            "  file=<str>, or file.driver=<str> and what that takes (required)\n",
            "  node-name=<str>\n",
            "  cache.direct=<bool (on/off)>\n",
            "  discard=<ignore|unmap>\n",
            "  offset=<int>\n",
        ] {
            assert!(raw.contains(row), "{raw}");
        }
        assert!(!raw.contains("  driver="), "{raw}");
        let nbd = help(HelpTopic::Blockdev, "driver=nbd,help");
        assert!(
            nbd.contains("  server.path=<str> (required with server.type=unix)\n"),
            "{nbd}"
        );
        let blkdebug = help(HelpTopic::Blockdev, "blkdebug,help");
        assert!(
            blkdebug.contains("  inject-error.0.event=<str>\n"),
            "{blkdebug}"
        );
        let export = help(HelpTopic::Export, "nbd,help");
        assert!(
            export.contains("  node-name=<str> (required)\n"),
            "{export}"
        );
        assert!(export.contains("  bitmaps.0=<str>\n"), "{export}");
        let server = help(HelpTopic::NbdServer, "help");
        assert!(
            server.contains("  addr.path=<str> (required with addr.type=unix)\n"),
            "{server}"
        );
    }
}
