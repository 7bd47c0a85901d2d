//! The properties of a `throttle-group`: `limits`, and `x-…` for each of them.

use block::RateLimit;

use super::*;

/// A number of the limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// `iops-total`, …
    Rate(Bucket),
    /// `iops-total-max`, …
    Burst(Bucket),
    /// `iops-total-max-length`, …
    BurstLength(Bucket),
    /// `iops-size`.
    IopsSize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bucket {
    IopsTotal,
    IopsRead,
    IopsWrite,
    BpsTotal,
    BpsRead,
    BpsWrite,
}

impl Bucket {
    fn of(self, limits: &mut ThrottleLimits) -> &mut RateLimit {
        match self {
            Self::IopsTotal => &mut limits.iops_total,
            Self::IopsRead => &mut limits.iops_read,
            Self::IopsWrite => &mut limits.iops_write,
            Self::BpsTotal => &mut limits.bps_total,
            Self::BpsRead => &mut limits.bps_read,
            Self::BpsWrite => &mut limits.bps_write,
        }
    }
}

/// All numbers by their `x-` names, in the order of QEMU's schema.
const PARTS: &[(&str, Part)] = &[
    ("x-iops-total", Part::Rate(Bucket::IopsTotal)),
    ("x-iops-total-max", Part::Burst(Bucket::IopsTotal)),
    (
        "x-iops-total-max-length",
        Part::BurstLength(Bucket::IopsTotal),
    ),
    ("x-iops-read", Part::Rate(Bucket::IopsRead)),
    ("x-iops-read-max", Part::Burst(Bucket::IopsRead)),
    (
        "x-iops-read-max-length",
        Part::BurstLength(Bucket::IopsRead),
    ),
    ("x-iops-write", Part::Rate(Bucket::IopsWrite)),
    ("x-iops-write-max", Part::Burst(Bucket::IopsWrite)),
    (
        "x-iops-write-max-length",
        Part::BurstLength(Bucket::IopsWrite),
    ),
    ("x-bps-total", Part::Rate(Bucket::BpsTotal)),
    ("x-bps-total-max", Part::Burst(Bucket::BpsTotal)),
    (
        "x-bps-total-max-length",
        Part::BurstLength(Bucket::BpsTotal),
    ),
    ("x-bps-read", Part::Rate(Bucket::BpsRead)),
    ("x-bps-read-max", Part::Burst(Bucket::BpsRead)),
    ("x-bps-read-max-length", Part::BurstLength(Bucket::BpsRead)),
    ("x-bps-write", Part::Rate(Bucket::BpsWrite)),
    ("x-bps-write-max", Part::Burst(Bucket::BpsWrite)),
    (
        "x-bps-write-max-length",
        Part::BurstLength(Bucket::BpsWrite),
    ),
    ("x-iops-size", Part::IopsSize),
];

/// The name inside `limits`.
fn short(name: &str) -> &str {
    name.strip_prefix("x-").unwrap_or(name)
}

/// Numbers that were given.
type Given = Vec<(&'static str, Part, i64)>;

/// What `object-add` was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GroupProperties {
    limits: Option<Given>,
    single: Given,
}

impl GroupProperties {
    pub(super) fn read(args: &mut Args) -> Result<Self, QmpError> {
        let limits = match args.optional_object("limits")? {
            Some(limits) => Some(read_limits(limits)?),
            None => None,
        };
        let mut single = Vec::new();
        for (name, part) in PARTS {
            if let Some(value) = args.optional_i64(name)? {
                single.push((*name, *part, value));
            }
        }
        Ok(Self { limits, single })
    }

    /// The limits that they say.
    pub(super) fn limits(&self) -> Result<ThrottleLimits, QmpError> {
        let mut limits = ThrottleLimits::default();
        for (name, part, value) in &self.single {
            if *value < 0 {
                return Err(QmpError::generic("Property values cannot be negative"));
            }
            if let Part::BurstLength(_) = part
                && u32::try_from(*value).is_err()
            {
                // The missing space is QEMU's.
                return Err(QmpError::generic(format!(
                    "{name} value must be in therange [0, {}]",
                    u32::MAX
                )));
            }
            set(&mut limits, *part, *value);
        }
        if let Some(given) = &self.limits {
            merge(&mut limits, given)?;
        }
        Ok(limits)
    }
}

/// `limits` with what `value` says; what it does not name stays.
pub(super) fn with_changes(
    mut limits: ThrottleLimits,
    value: Value,
) -> Result<ThrottleLimits, QmpError> {
    let mut args = Args::of_property("limits", value);
    let given = match args.optional_object("limits")? {
        Some(given) => read_limits(given)?,
        None => Vec::new(),
    };
    merge(&mut limits, &given)?;
    Ok(limits)
}

fn read_limits(mut args: Args) -> Result<Given, QmpError> {
    let mut given = Vec::new();
    for (name, part) in PARTS {
        if let Some(value) = args.optional_i64(short(name))? {
            given.push((*name, *part, value));
        }
    }
    args.finish()?;
    Ok(given)
}

fn merge(limits: &mut ThrottleLimits, given: &Given) -> Result<(), QmpError> {
    for (name, part, value) in given {
        if let Part::BurstLength(_) = part
            && *value > i64::from(u32::MAX)
        {
            return Err(QmpError::generic(format!(
                "{} value must be in the range [0, {}]",
                short(name),
                u32::MAX
            )));
        }
        set(limits, *part, *value);
    }
    limits
        .check()
        .map_err(|error| QmpError::generic(error.to_string()))?;
    let is_negative_length =
        |(_, part, value): &(_, Part, i64)| matches!(part, Part::BurstLength(_)) && *value < 0;
    match given.iter().any(is_negative_length) {
        // There is a burst, or the check had said so.
        true => Err(QmpError::generic(
            "burst length too high for this burst rate",
        )),
        false => Ok(()),
    }
}

/// A negative value becomes a huge one, as in QEMU, and is refused as such by the
/// check of the whole.
fn set(limits: &mut ThrottleLimits, part: Part, value: i64) {
    match part {
        Part::Rate(bucket) => bucket.of(limits).rate = value.cast_unsigned(),
        Part::Burst(bucket) => bucket.of(limits).burst = value.cast_unsigned(),
        Part::BurstLength(bucket) => {
            bucket.of(limits).burst_seconds = u32::try_from(value).unwrap_or(u32::MAX);
        }
        Part::IopsSize => limits.iops_size = value.cast_unsigned(),
    }
}

fn get(limits: &mut ThrottleLimits, part: Part) -> i64 {
    match part {
        Part::Rate(bucket) => bucket.of(limits).rate.cast_signed(),
        Part::Burst(bucket) => bucket.of(limits).burst.cast_signed(),
        Part::BurstLength(bucket) => bucket.of(limits).burst_seconds.into(),
        // Not checked: a negative one is there.
        Part::IopsSize => limits.iops_size.cast_signed(),
    }
}

/// A property's value; `None`: there is none of that name.
pub(super) fn property(group: &ThrottleGroup, name: &str) -> Option<Value> {
    let mut limits = group.limits();
    if name == "limits" {
        let all = PARTS
            .iter()
            .map(|(name, part)| (short(name).to_owned(), get(&mut limits, *part).into()));
        return Some(Value::Object(all.collect()));
    }
    let (_, part) = PARTS.iter().find(|(known, _)| *known == name)?;
    Some(get(&mut limits, *part).into())
}

/// Changes a property; `None`: there is none of that name.
pub(super) fn set_property(
    group: &ThrottleGroup,
    name: &str,
    value: Value,
) -> Option<Result<(), QmpError>> {
    if name == "limits" {
        return Some(with_changes(group.limits(), value).and_then(|limits| {
            group
                .set_limits(limits)
                .map_err(|error| QmpError::generic(error.to_string()))
        }));
    }
    PARTS.iter().any(|(known, _)| *known == name).then(|| {
        Err(QmpError::generic(
            "Property cannot be set after initialization",
        ))
    })
}

/// Names and types of the properties.
pub(super) fn properties() -> impl Iterator<Item = (&'static str, &'static str)> {
    let single = PARTS.iter().map(|(name, _)| (*name, "int"));
    std::iter::once(("limits", "ThrottleLimits")).chain(single)
}
