//! A visitor of a command's arguments that answers mistakes with QEMU's texts.
//!
//! A command takes its arguments one by one, in the order of QEMU's schema,
//! and then calls [`Args::finish`], which refuses what is left over. So the
//! first mistake that QEMU would report is the one reported here.
//!
//! The same visitor reads `key=value` options of the command line, whose
//! values are all strings ([`Args::from_keyval`]).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use serde_json::{Map, Value};

use super::error::QmpError;
use super::json::{Limits, Reader};
use taken::Kind;

pub(super) mod taken;
#[cfg(test)]
mod tests;

/// How the values were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// JSON: typed.
    Json,
    /// The command line: strings, to be read as what is expected.
    KeyValue,
}

/// Options are not nested deeper than this.
const MAX_PATH: usize = 8;

/// Puts what is inside of a value under its path, which has `depth` parts.
fn flatten(path: &str, value: &Value, depth: usize, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(members) if !members.is_empty() && depth < MAX_PATH => {
            for (name, value) in members {
                flatten(&format!("{path}.{name}"), value, depth + 1, into);
            }
        }
        Value::Array(elements) if !elements.is_empty() && depth < MAX_PATH => {
            for (index, value) in elements.iter().enumerate() {
                flatten(&format!("{path}.{index}"), value, depth + 1, into);
            }
        }
        value => {
            into.insert(path.to_owned(), value.to_string());
        }
    }
}

/// Arguments not taken yet.
#[derive(Debug)]
#[must_use = "arguments that nobody expects are only noticed by finish()"]
pub(crate) struct Args {
    /// Path of this object in the command's arguments, with a dot at its end;
    /// empty for the arguments themselves.
    prefix: String,
    members: Map<String, Value>,
    form: Form,
    shared: Rc<RefCell<Shared>>,
}

/// What arguments and the objects inside them have in common.
#[derive(Debug, Default)]
struct Shared {
    /// What is wrong with the values, told if nothing is wrong with their form.
    refusal: Option<QmpError>,
    /// The numbers, yes or nos and texts that were taken, by their paths.
    said: Vec<(String, Value)>,
}

/// A member that may be a string or an object.
pub(crate) enum StringOrObject {
    /// A string.
    String(String),
    /// An object.
    Object(Args),
}

impl Args {
    /// The arguments of a command.
    pub(crate) fn new(members: Map<String, Value>) -> Self {
        Self {
            prefix: String::new(),
            members,
            form: Form::Json,
            shared: Rc::default(),
        }
    }

    /// All members but these as they were written, by their paths, those without a value
    /// left out; `None` of a command line, on which numbers are written in several ways.
    pub(crate) fn written_without(&self, names: &[&str]) -> Option<BTreeMap<String, String>> {
        if self.form != Form::Json {
            return None;
        }
        let mut written = BTreeMap::new();
        for (name, value) in &self.members {
            if !names.contains(&&**name) {
                flatten(name, value, 1, &mut written);
            }
        }
        Some(written)
    }

    /// Options from `key=value,key.sub=value`. A comma in a value is doubled, one at the
    /// end means nothing. The elements of a list have their places as keys.
    ///
    /// Errors: a part without `=`, a key given twice or used both as a value
    /// and as an object, an empty part of a key, more than 16 levels.
    pub(crate) fn from_keyval(text: &str) -> Result<Self, QmpError> {
        let mut members = Map::new();
        let mut parts = split_unescaped(text);
        if parts.last().is_some_and(String::is_empty) {
            parts.pop();
        }
        for part in parts {
            let Some((key, value)) = part.split_once('=') else {
                return Err(QmpError::generic(format!(
                    "Expected '=' after parameter '{part}'"
                )));
            };
            insert_dotted(&mut members, key, value)?;
        }
        Ok(Self {
            form: Form::KeyValue,
            ..Self::new(members)
        })
    }

    /// As [`from_keyval`](Self::from_keyval), where the first part may be the value
    /// of `implied` alone.
    pub(crate) fn from_keyval_implied(text: &str, implied: &str) -> Result<Self, QmpError> {
        let first = text.split(',').next().unwrap_or_default();
        if first.is_empty() || first.contains('=') {
            return Self::from_keyval(text);
        }
        Self::from_keyval(&format!("{implied}={text}"))
    }

    /// Options of the command line: JSON if they begin with a brace, else as
    /// [`from_keyval`](Self::from_keyval), where the first part may be the value of
    /// `implied` alone.
    pub(crate) fn from_option(text: &str, implied: Option<&str>) -> Result<Self, QmpError> {
        if !text.trim_start().starts_with('{') {
            return match implied {
                Some(implied) => Self::from_keyval_implied(text, implied),
                None => Self::from_keyval(text),
            };
        }
        let mut reader = Reader::new(Limits::default());
        let mut rest = text.as_bytes();
        match reader.next(&mut rest) {
            Some(Ok(Value::Object(members))) if rest.trim_ascii().is_empty() => {
                Ok(Self::new(members))
            }
            Some(Err(error)) => Err(QmpError::generic(error.to_string())),
            _ => Err(QmpError::generic("Expecting one JSON object")),
        }
    }

    /// A value on its own, to be taken under `name`.
    pub(crate) fn of_property(name: &str, value: Value) -> Self {
        Self::new(Map::from_iter([(name.to_owned(), value)]))
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// What to answer if there is no argument of that name.
    pub(crate) fn missing(&self, name: &str) -> QmpError {
        QmpError::missing(&self.path(name))
    }

    /// Tells the tests what is looked for.
    fn note(&self, name: &str, kind: Kind) {
        taken::note(|| self.path(name), kind);
    }

    fn wrong_type(&self, name: &str, expected: &str) -> QmpError {
        QmpError::wrong_type(&self.path(name), expected)
    }

    /// A value of any type.
    pub(crate) fn required_any(&mut self, name: &str) -> Result<Value, QmpError> {
        self.note(name, Kind::Any);
        self.members.remove(name).ok_or_else(|| self.missing(name))
    }

    /// A string, if given.
    pub(crate) fn optional_str(&mut self, name: &str) -> Result<Option<String>, QmpError> {
        self.note(name, Kind::Str);
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::String(value)) => {
                self.say(name, value.as_str());
                Ok(Some(value))
            }
            Some(_) => Err(self.wrong_type(name, "string")),
        }
    }

    /// Remembers what was given.
    fn say(&self, name: &str, value: impl Into<Value>) {
        let said = (self.path(name), value.into());
        self.shared.borrow_mut().said.push(said);
    }

    /// Numbers, yes or nos and texts that have been taken of this object and of those
    /// inside, by their paths from here (`rules[0].event`), in the order in which they
    /// were taken.
    pub(crate) fn said(&self) -> Vec<(String, Value)> {
        let shared = self.shared.borrow();
        let mine = shared.said.iter().filter_map(|(path, value)| {
            let path = path.strip_prefix(&self.prefix)?;
            Some((path.to_owned(), value.clone()))
        });
        mine.collect()
    }

    /// A string.
    pub(crate) fn required_str(&mut self, name: &str) -> Result<String, QmpError> {
        self.optional_str(name)?.ok_or_else(|| self.missing(name))
    }

    /// A boolean, if given; `on` and `off` (or `yes`, `true`, …) on the
    /// command line.
    pub(crate) fn optional_bool(&mut self, name: &str) -> Result<Option<bool>, QmpError> {
        self.note(name, Kind::Bool);
        let value = match (self.form, self.members.remove(name)) {
            (_, None) => return Ok(None),
            (Form::Json, Some(Value::Bool(value))) => Ok(value),
            (Form::KeyValue, Some(Value::String(text))) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(true),
                "off" | "no" | "false" | "n" => Ok(false),
                _ => Err(QmpError::expects(&self.path(name), "'on' or 'off'")),
            },
            _ => Err(self.wrong_type(name, "boolean")),
        };
        value.map(|value| {
            self.say(name, value);
            Some(value)
        })
    }

    /// A signed integer, if given. On the command line with an optional
    /// binary suffix (`64K`, `1M`).
    pub(crate) fn optional_i64(&mut self, name: &str) -> Result<Option<i64>, QmpError> {
        self.note(name, Kind::Int);
        let value = match (self.form, self.members.remove(name)) {
            (_, None) => return Ok(None),
            (Form::Json, Some(Value::Number(value))) => value.as_i64(),
            (Form::KeyValue, Some(Value::String(text))) => parse_size(&text),
            _ => None,
        };
        match value {
            Some(value) => {
                self.say(name, value);
                Ok(Some(value))
            }
            None => Err(self.wrong_type(name, "integer")),
        }
    }

    /// A signed integer.
    pub(crate) fn required_i64(&mut self, name: &str) -> Result<i64, QmpError> {
        self.optional_i64(name)?.ok_or_else(|| self.missing(name))
    }

    /// An integer of 0 to 2^63-1, if given: QEMU's `int` where a negative
    /// number has no meaning.
    pub(crate) fn optional_non_negative(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        match self.optional_i64(name)?.map(u64::try_from) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(_)) => {
                // Without its path, as QEMU's options of drivers are.
                self.refuse(QmpError::expects(name, "a non-negative number below 2^64"));
                Ok(None)
            }
        }
    }

    /// An unsigned integer of 64 bits, if given.
    pub(crate) fn optional_u64(&mut self, name: &str) -> Result<Option<u64>, QmpError> {
        self.note(name, Kind::Int);
        if let (Form::Json, Some(value)) = (self.form, self.members.get(name)) {
            // QEMU takes a negative number for what it is modulo 2^64.
            let number = value.as_u64().or(value.as_i64().map(i64::cast_unsigned));
            self.members.remove(name);
            return match number {
                Some(number) => {
                    self.say(name, number.cast_signed());
                    Ok(Some(number))
                }
                None => Err(QmpError::expects(&self.path(name), "uint64")),
            };
        }
        match self.optional_i64(name)?.map(u64::try_from) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(_)) => Err(QmpError::expects(&self.path(name), "uint64")),
        }
    }

    /// An unsigned integer of 32 bits, if given.
    pub(crate) fn optional_u32(&mut self, name: &str) -> Result<Option<u32>, QmpError> {
        self.note(name, Kind::Int);
        if self.form == Form::Json
            && let Some(value) = self.members.get(name)
            && !value.is_i64()
        {
            let expected = if value.is_u64() { "uint32_t" } else { "uint64" };
            return Err(QmpError::expects(&self.path(name), expected));
        }
        match self.optional_i64(name)?.map(u32::try_from) {
            None => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(_)) => Err(QmpError::expects(&self.path(name), "uint32_t")),
        }
    }

    /// An integer of 0 to 2^31-1, if given: QEMU's `int32` where a negative number
    /// has no meaning.
    pub(crate) fn optional_non_negative_i32(
        &mut self,
        name: &str,
    ) -> Result<Option<u32>, QmpError> {
        let Some(value) = self.optional_i64(name)? else {
            return Ok(None);
        };
        let value =
            i32::try_from(value).map_err(|_| QmpError::expects(&self.path(name), "int32_t"))?;
        match u32::try_from(value) {
            Ok(value) => Ok(Some(value)),
            Err(_) => {
                let error = QmpError::expects(name, "a non-negative number below 2^64");
                self.refuse(error);
                Ok(None)
            }
        }
    }

    /// One of a few words, if given.
    pub(crate) fn optional_enum<T: Copy>(
        &mut self,
        name: &str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, QmpError> {
        let given = self.optional_str(name)?;
        self.note(name, Kind::words(words));
        let Some(given) = given else {
            return Ok(None);
        };
        match words.iter().find(|(word, _)| *word == given) {
            Some((_, value)) => Ok(Some(*value)),
            None => Err(QmpError::bad_value(name, &given)),
        }
    }

    /// One of a few words.
    pub(crate) fn required_enum<T: Copy>(
        &mut self,
        name: &str,
        words: &[(&str, T)],
    ) -> Result<T, QmpError> {
        self.optional_enum(name, words)?
            .ok_or_else(|| self.missing(name))
    }

    /// A list of words, if given.
    pub(crate) fn optional_enum_list<T: Copy>(
        &mut self,
        name: &str,
        words: &[(&str, T)],
    ) -> Result<Option<Vec<T>>, QmpError> {
        let elements = self.optional_elements(name)?;
        self.note(name, Kind::list_of_words(words));
        let Some(elements) = elements else {
            return Ok(None);
        };
        let mut values = Vec::with_capacity(elements.len());
        for (index, element) in elements.into_iter().enumerate() {
            let Value::String(given) = element else {
                return Err(self.wrong_type(&format!("{name}[{index}]"), "string"));
            };
            // An element has no name of its own, and QEMU prints that so.
            match words.iter().find(|(word, _)| *word == given) {
                Some((_, value)) => values.push(*value),
                None => return Err(QmpError::bad_value("null", &given)),
            }
        }
        Ok(Some(values))
    }

    /// The elements of a list, if given. On the command line their places are keys
    /// (`rules.0.event=…`).
    fn optional_elements(&mut self, name: &str) -> Result<Option<Vec<Value>>, QmpError> {
        self.note(name, Kind::List);
        match (self.form, self.members.remove(name)) {
            (_, None) => Ok(None),
            (Form::Json, Some(Value::Array(elements))) => Ok(Some(elements)),
            (Form::KeyValue, Some(Value::Object(mut members))) => (0..members.len())
                .map(|place| {
                    let element = members.remove(&place.to_string());
                    element.ok_or_else(|| self.missing(&format!("{name}.{place}")))
                })
                .collect::<Result<_, _>>()
                .map(Some),
            _ => Err(self.wrong_type(name, "array")),
        }
    }

    /// A list of objects, if given.
    pub(crate) fn optional_list(&mut self, name: &str) -> Result<Option<Vec<Self>>, QmpError> {
        let Some(elements) = self.optional_elements(name)? else {
            return Ok(None);
        };
        let place = |(index, element)| match element {
            Value::Object(members) => Ok(self.nested(&format!("{name}[{index}]"), members)),
            _ => Err(self.wrong_type(&format!("{name}[{index}]"), "object")),
        };
        let list: Result<_, _> = elements.into_iter().enumerate().map(place).collect();
        list.map(Some)
    }

    /// An object.
    pub(crate) fn required_object(&mut self, name: &str) -> Result<Self, QmpError> {
        self.optional_object(name)?
            .ok_or_else(|| self.missing(name))
    }

    /// A list of strings and objects, if given; `type_name` is what QEMU calls the
    /// choice.
    pub(crate) fn optional_list_of_string_or_object(
        &mut self,
        name: &str,
        type_name: &str,
    ) -> Result<Option<Vec<StringOrObject>>, QmpError> {
        let Some(elements) = self.optional_elements(name)? else {
            return Ok(None);
        };
        let values = elements.into_iter().enumerate();
        let values = values.map(|(index, element)| match element {
            Value::String(value) => Ok(StringOrObject::String(value)),
            Value::Object(members) => Ok(StringOrObject::Object(
                self.nested(&format!("{name}[{index}]"), members),
            )),
            // An element has no name of its own, and QEMU prints that so.
            _ => Err(QmpError::wrong_type("null", type_name)),
        });
        values.collect::<Result<_, _>>().map(Some)
    }

    /// An object, if given.
    pub(crate) fn optional_object(&mut self, name: &str) -> Result<Option<Self>, QmpError> {
        self.note(name, Kind::Object);
        match self.members.remove(name) {
            None => Ok(None),
            Some(Value::Object(members)) => Ok(Some(self.nested(name, members))),
            Some(_) => Err(self.wrong_type(name, "object")),
        }
    }

    /// A list of objects.
    pub(crate) fn required_object_list(&mut self, name: &str) -> Result<Vec<Self>, QmpError> {
        self.optional_list(name)?.ok_or_else(|| self.missing(name))
    }

    /// A string or an object; `type_name` is what QEMU calls the choice.
    pub(crate) fn required_string_or_object(
        &mut self,
        name: &str,
        type_name: &str,
    ) -> Result<StringOrObject, QmpError> {
        self.note(name, Kind::StringOrObject);
        match self.members.remove(name) {
            None => Err(self.missing(name)),
            Some(Value::String(value)) => Ok(StringOrObject::String(value)),
            Some(Value::Object(members)) => Ok(StringOrObject::Object(self.nested(name, members))),
            // Without its path, as QEMU says it of a choice.
            Some(_) => Err(QmpError::wrong_type(name, type_name)),
        }
    }

    /// A string, an object, or null (`Some(None)`), if given.
    pub(crate) fn optional_string_object_or_null(
        &mut self,
        name: &str,
        type_name: &str,
    ) -> Result<Option<Option<StringOrObject>>, QmpError> {
        self.note(name, Kind::StringOrObject);
        match self.members.get(name) {
            None => Ok(None),
            Some(Value::Null) => {
                self.members.remove(name);
                Ok(Some(None))
            }
            Some(_) => self
                .required_string_or_object(name, type_name)
                .map(|value| Some(Some(value))),
        }
    }

    /// Whether there is such an argument, not taken yet.
    pub(crate) fn is_given(&self, name: &str) -> bool {
        self.members.contains_key(name)
    }

    fn nested(&self, name: &str, members: Map<String, Value>) -> Self {
        Self {
            prefix: format!("{}{name}.", self.prefix),
            members,
            form: self.form,
            shared: Rc::clone(&self.shared),
        }
    }

    /// Something is wrong with values that are well-formed: [`finish`](Self::finish) of
    /// the arguments as a whole says so, unless there is an argument that nobody took.
    /// The first that is said counts.
    pub(crate) fn refuse(&self, error: QmpError) {
        self.shared.borrow_mut().refusal.get_or_insert(error);
    }

    /// Refuses what nobody took.
    pub(crate) fn finish(self) -> Result<(), QmpError> {
        taken::finished(&self.prefix);
        if let Some(name) = self.members.keys().next() {
            return Err(QmpError::generic(format!(
                "Parameter '{}' is unexpected",
                self.path(name)
            )));
        }
        if !self.prefix.is_empty() {
            return Ok(());
        }
        match self.shared.borrow_mut().refusal.take() {
            Some(refusal) => Err(refusal),
            None => Ok(()),
        }
    }
}

/// Splits at single commas; a doubled comma is one that stays.
fn split_unescaped(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

/// Puts `a.b.c=value` where it belongs.
fn insert_dotted(members: &mut Map<String, Value>, key: &str, value: &str) -> Result<(), QmpError> {
    const MAX_LEVELS: usize = 16;
    let bad = || QmpError::generic(format!("Invalid parameter '{key}'"));
    let names: Vec<&str> = key.split('.').collect();
    let Some((last, objects)) = names.split_last() else {
        return Err(bad());
    };
    if names.len() > MAX_LEVELS || names.iter().any(|name| name.is_empty()) {
        return Err(bad());
    }
    let mut at = members;
    for name in objects {
        let child = at.entry(*name).or_insert_with(|| Value::Object(Map::new()));
        let Value::Object(child) = child else {
            return Err(bad());
        };
        at = child;
    }
    if at.contains_key(*last) {
        return Err(QmpError::generic(format!(
            "Parameter '{key}' is given twice"
        )));
    }
    at.insert((*last).to_owned(), Value::from(value));
    Ok(())
}

/// A number with an optional binary suffix, or a hexadecimal one with `0x`. No leading
/// zero: QEMU would read an octal number.
fn parse_size(text: &str) -> Option<i64> {
    let (sign, plain) = match text.strip_prefix('-') {
        Some(plain) => (-1, plain),
        None => (1, text),
    };
    let begins_with_digit = |text: &str| text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if let Some(digits) = plain.strip_prefix("0x").or(plain.strip_prefix("0X")) {
        let digits = Some(digits).filter(|digits| begins_with_digit(digits))?;
        return i64::from_str_radix(digits, 16)
            .ok()
            .map(|value| sign * value);
    }
    if plain.starts_with('0') && plain[1..].starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let shift = match text.chars().last()? {
        'k' | 'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => 0,
    };
    let digits = if shift == 0 {
        text
    } else {
        text.get(..text.len() - 1)?
    };
    digits.parse::<i64>().ok()?.checked_mul(1 << shift)
}
