//! Single values of a configuration: sizes, switches, lists of ids, and where
//! sockets and the serial port are. Each reads a string (from a flag or a
//! file), and a number or boolean where a file would have one.

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::str::FromStr;

use block::BlockdevOptions;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, de::Unexpected};

use super::{DiskSpec, IothreadSpec};
use crate::machine::{GIB, KIB, MAX_CPUS, MIB};
use crate::monitor::{ObjectOptions, QmpAddress, QmpError, parse_blockdev, parse_object};

/// A size of memory in bytes.
///
/// Read from a number of MiB, or a number with K, M, G or T behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl MemorySize {
    /// Memory by default.
    pub const DEFAULT: Self = Self(256 * MIB);
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let error =
            || format!("'{text}' is not a size; give MiB, or a number with K, M, G or T behind it");
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match &text[digits.len()..] {
            "" | "M" | "MiB" => MIB,
            "K" | "KiB" => KIB,
            "G" | "GiB" => GIB,
            "T" | "TiB" => 1024 * GIB,
            _ => return Err(error()),
        };
        // No sign, no blank: what Rust's own parser would let pass.
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(error());
        }
        digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(unit))
            .map(Self)
            .ok_or_else(error)
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = MemorySize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of MiB, or a string such as \"2G\"")
            }
            fn visit_u64<E: de::Error>(self, mib: u64) -> Result<MemorySize, E> {
                mib.checked_mul(MIB)
                    .map(MemorySize)
                    .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(mib), &self))
            }
            fn visit_i64<E: de::Error>(self, mib: i64) -> Result<MemorySize, E> {
                u64::try_from(mib)
                    .map_err(|_| E::invalid_value(Unexpected::Signed(mib), &self))
                    .and_then(|mib| self.visit_u64(mib))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<MemorySize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// Where the guest's serial port leads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialSpec {
    /// The terminal, or whatever stdin and stdout are.
    #[default]
    Stdio,
    /// Output into a file; no input.
    File(PathBuf),
    /// One client at a time of a unix socket.
    Unix(PathBuf),
    /// Nowhere.
    Null,
}

impl FromStr for SerialSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "null" => Ok(Self::Null),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!(
                "'{text}' is no place for a serial port; give stdio, file:PATH, unix:PATH or null"
            )),
        }
    }
}

/// Deserialises what has a `FromStr` from a string.
macro_rules! deserialize_from_str {
    ($($type:ty),+) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
    )+};
}
deserialize_from_str!(QmpAddress, SerialSpec);

/// The default of switches that are on.
pub fn on() -> bool {
    true
}

/// The default of counts.
pub fn one() -> u16 {
    1
}

/// A boolean, or `on` or `off`.
pub fn on_off<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    struct OnOff;
    impl Visitor<'_> for OnOff {
        type Value = bool;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("on or off")
        }
        fn visit_bool<E: de::Error>(self, value: bool) -> Result<bool, E> {
            Ok(value)
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<bool, E> {
            match text {
                "on" => Ok(true),
                "off" => Ok(false),
                _ => Err(E::invalid_value(Unexpected::Str(text), &self)),
            }
        }
    }
    deserializer.deserialize_any(OnOff)
}

/// A small number.
pub fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    struct Count;
    impl Visitor<'_> for Count {
        type Value = u16;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number from 0 to 65535")
        }
        fn visit_u64<E: de::Error>(self, value: u64) -> Result<u16, E> {
            u16::try_from(value).map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
        }
        fn visit_i64<E: de::Error>(self, value: i64) -> Result<u16, E> {
            u16::try_from(value).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<u16, E> {
            text.parse()
                .map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
        }
    }
    deserializer.deserialize_any(Count)
}

/// A number of vCPUs.
pub fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u8>, D::Error> {
    struct Cpus;
    impl Visitor<'_> for Cpus {
        type Value = u8;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a number from 1 to {MAX_CPUS}")
        }
        fn visit_u64<E: de::Error>(self, value: u64) -> Result<u8, E> {
            u8::try_from(value)
                .ok()
                .filter(|cpus| (1..=MAX_CPUS).contains(cpus))
                .ok_or_else(|| E::invalid_value(Unexpected::Unsigned(value), &self))
        }
        fn visit_i64<E: de::Error>(self, value: i64) -> Result<u8, E> {
            u64::try_from(value)
                .map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
                .and_then(|value| self.visit_u64(value))
        }
    }
    deserializer.deserialize_any(Cpus).map(Some)
}

/// Disks.
pub fn disks<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DiskSpec>, D::Error> {
    list(deserializer, "disks, each a table with its path")
}

/// Iothreads.
pub fn iothreads<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<IothreadSpec>, D::Error> {
    list(deserializer, "iothreads, each a table with its id")
}

/// Addresses of monitor sockets.
pub fn addresses<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<QmpAddress>, D::Error> {
    list(deserializer, "addresses, each as unix:PATH")
}

/// Paths.
pub fn paths<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    list(deserializer, "paths")
}

/// Objects.
pub fn objects<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ObjectOptions>, D::Error> {
    options(
        deserializer,
        "objects, each a table with its qom-type and id",
        parse_object,
    )
}

/// Nodes.
pub fn nodes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<BlockdevOptions>, D::Error> {
    options(
        deserializer,
        "nodes, each a table with its driver and node-name",
        parse_blockdev,
    )
}

/// A list of what the monitor takes, each in a table of the form that its JSON has.
fn options<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    what: &'static str,
    parse: fn(&str) -> Result<T, QmpError>,
) -> Result<Vec<T>, D::Error> {
    let tables: Vec<serde_json::Map<String, serde_json::Value>> = list(deserializer, what)?;
    tables
        .into_iter()
        .map(|table| parse(&serde_json::Value::from(table).to_string()).map_err(de::Error::custom))
        .collect()
}

/// A list, whose elements are `what` to the user.
fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    what: &'static str,
) -> Result<Vec<T>, D::Error> {
    struct List<T>(&'static str, PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for List<T> {
        type Value = Vec<T>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a list of {}", self.0)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut elements = Vec::new();
            while let Some(element) = seq.next_element()? {
                elements.push(element);
            }
            Ok(elements)
        }
    }
    deserializer.deserialize_any(List(what, PhantomData))
}

/// A list of different ids, or a string with `+` between them.
pub fn id_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    struct IdList;
    impl<'de> Visitor<'de> for IdList {
        type Value = Vec<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an id, or several as in a+b")
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<String>, E> {
            Ok(text.split('+').map(str::to_owned).collect())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<String>, A::Error> {
            let mut ids = Vec::new();
            while let Some(id) = seq.next_element()? {
                ids.push(id);
            }
            Ok(ids)
        }
    }
    let ids = deserializer.deserialize_any(IdList)?;
    if ids.iter().any(String::is_empty) {
        let text = ids.join("+");
        return Err(de::Error::invalid_value(Unexpected::Str(&text), &IdList));
    }
    for (index, id) in ids.iter().enumerate() {
        if ids[..index].contains(id) {
            return Err(de::Error::custom(format_args!(
                "iothread '{id}' is given twice; name each once"
            )));
        }
    }
    Ok(ids)
}
