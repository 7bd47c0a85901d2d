//! The properties of an `iothread`.
//!
//! They are kept and shown, and do nothing: a loop here sleeps in epoll, batches
//! by what is ready, and has no pool of threads of its own.

use super::*;

/// QEMU's names of the properties, in the order of its schema, with defaults.
const NAMES: [(&str, i64); 6] = [
    ("aio-max-batch", 0),
    ("thread-pool-min", 0),
    ("thread-pool-max", 64),
    ("poll-max-ns", 32768),
    ("poll-grow", 0),
    ("poll-shrink", 0),
];

/// Values of the properties, as `NAMES` orders them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct IothreadProperties([i64; 6]);

impl IothreadProperties {
    pub(super) fn read(args: &mut Args) -> Result<Self, QmpError> {
        let mut values = NAMES.map(|(_, default)| default);
        for (value, (name, _)) in values.iter_mut().zip(NAMES) {
            if let Some(given) = args.optional_i64(name)? {
                *value = given;
            }
        }
        Ok(Self(values))
    }

    /// Each by itself.
    pub(super) fn check_ranges(&self) -> Result<(), QmpError> {
        let bad = self.0.iter().zip(NAMES).find(|(value, _)| **value < 0);
        match bad {
            Some((_, (name, _))) => Err(QmpError::generic(format!(
                "{name} value must be in range [0, {}]",
                i64::MAX
            ))),
            None => Ok(()),
        }
    }

    /// All together.
    pub(super) fn check(&self) -> Result<(), QmpError> {
        let [_, min, max, ..] = self.0;
        if max == 0 || min > max || max > i32::MAX.into() {
            return Err(QmpError::generic(
                "bad thread-pool-min/thread-pool-max values",
            ));
        }
        Ok(())
    }

    fn index(name: &str) -> Option<usize> {
        NAMES.iter().position(|(known, _)| *known == name)
    }

    /// A property's value; `None`: there is none of that name.
    pub(super) fn property(&self, name: &str) -> Option<Value> {
        Self::index(name).map(|index| self.0[index].into())
    }

    /// Changes a property; `None`: there is none of that name.
    pub(super) fn set_property(
        &mut self,
        name: &str,
        value: Value,
    ) -> Option<Result<(), QmpError>> {
        let index = Self::index(name)?;
        let changed = Args::of_property(name, value)
            .required_i64(name)
            .and_then(|value| {
                let mut changed = *self;
                changed.0[index] = value;
                changed.check_ranges()?;
                changed.check()?;
                Ok(changed)
            });
        Some(changed.map(|changed| *self = changed))
    }
}

/// Names and types of the properties.
pub(super) fn properties() -> impl Iterator<Item = (&'static str, &'static str)> {
    NAMES.iter().map(|(name, _)| (*name, "int"))
}
