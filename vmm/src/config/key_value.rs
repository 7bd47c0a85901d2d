//! `key=value,key=value`: how a flag says what a configuration file says in a
//! table. One description of a table serves both, and the help.

use serde::de::DeserializeOwned;

/// Declares a table: the struct, its deserialisation (unknown keys are
/// refused), `FromStr` for flags, and `HELP` from the fields' doc comments.
macro_rules! key_value_spec {
    (
        $(#[doc = $about:literal])+
        $vis:vis struct $name:ident {
            $(
                $(#[doc = $doc:literal])+
                $(#[serde($($serde:tt)*)])?
                $fvis:vis $field:ident: $type:ty,
            )+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        $vis struct $name {
            $(
                $(#[doc = $doc])+
                $(#[serde($($serde)*)])?
                $fvis $field: $type,
            )+
        }

        impl $name {
            /// The keys and what they mean, for the help of a flag.
            pub const HELP: &str = concat!(
                $($about,)+ " Keys:\n"
                $(, "  ", stringify!($field), ":" $(, $doc)+, "\n")+
                , "A comma in a value is written twice."
            );
        }

        impl std::str::FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                $crate::config::key_value::parse(text)
            }
        }
    };
}
pub(super) use key_value_spec;

/// Parses `key=value,…`; two commas are one in a value.
///
/// Errors: one line for the user.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut table = serde_json::Map::new();
    for item in split(text) {
        let (key, value) = item
            .split_once('=')
            .ok_or_else(|| format!("'{item}' is not of the form key=value"))?;
        if table.insert(key.to_owned(), value.into()).is_some() {
            return Err(format!("'{key}' is given twice"));
        }
    }
    serde_json::from_value(table.into()).map_err(|error| error.to_string())
}

/// Splits at single commas, and makes double ones single.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}
