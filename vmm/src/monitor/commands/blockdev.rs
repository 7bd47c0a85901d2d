//! `blockdev-add`, `blockdev-del`, and the options of a node on the wire.

use std::rc::Rc;

use block::{
    BackingRef, BlockdevOptions, BlockdevRef, CacheChoice, DetectZeroes, DiscardMode,
    DriverOptions, OptionValue, Written,
};
use serde_json::Value;

use super::{Outcome, PATIENCE, bounded, bounded_by, done};
use crate::monitor::Monitor;
use crate::monitor::args::{Args, StringOrObject};
use crate::monitor::error::QmpError;

mod blkdebug;
pub(super) mod drivers;
#[cfg(test)]
mod tests;

pub(super) async fn blockdev_add(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let options = blockdev_options(args)?;
    // Who waits for a server keeps nobody else waiting, and waits as long as was asked
    // for.
    let server = options.server_patience();
    let _alone = match server {
        None => Some(monitor.graph_commands.lock().await),
        Some(_) => None,
    };
    let patience = PATIENCE.saturating_add(server.unwrap_or_default());
    let opening = monitor.graph.blockdev_add(options);
    bounded_by(patience, "Opening the node", opening)
        .await?
        .map_err(QmpError::from)?;
    done()
}

pub(super) async fn blockdev_del(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let name = args.required_str("node-name")?;
    args.finish()?;
    let _alone = monitor.graph_commands.lock().await;
    bounded("Closing the node", monitor.graph.blockdev_del(&name))
        .await?
        .map_err(QmpError::from)?;
    done()
}

pub(super) async fn blockdev_reopen(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let nodes = args.required_object_list("options")?;
    let options = nodes
        .into_iter()
        .map(|args| node_options(args, &Common::default()));
    let options = options.collect::<Result<Vec<_>, _>>()?;
    args.finish()?;
    let _alone = monitor.graph_commands.lock().await;
    let reopened = bounded("Reopening the nodes", monitor.graph.reopen(options)).await;
    if let Some(machine) = monitor.machine() {
        machine.refresh_disks();
    }
    reopened?.map_err(QmpError::from)?;
    done()
}

/// Members of a node's options that are no driver's own, and children.
const NOT_THE_DRIVERS: &[&str] = &[
    "auto-read-only",
    "backing",
    "cache",
    "data-file",
    "detect-zeroes",
    "discard",
    "driver",
    "file",
    "image",
    "node-name",
    "read-only",
    "target",
];

/// Reads what is one driver's own of a node's options.
type ReadDriver = fn(&mut Args, &Common) -> Result<DriverOptions, QmpError>;

/// Drivers by QMP's names, with who reads their options.
const DRIVERS: &[(&str, ReadDriver)] = &[
    ("blkdebug", blkdebug::options),
    ("copy-before-write", drivers::copy_before_write),
    ("copy-on-read", drivers::copy_on_read),
    ("file", drivers::file),
    ("host_device", drivers::host_device),
    ("nbd", drivers::nbd),
    ("null-aio", drivers::null_aio),
    ("null-co", drivers::null_co),
    ("preallocate", drivers::preallocate),
    ("qcow2", drivers::qcow2),
    ("raw", drivers::raw),
    ("snapshot-access", drivers::snapshot_access),
    ("throttle", drivers::throttle),
];

/// Reads `--blockdev`: JSON if it begins with a brace, else `[driver=]DRIVER,key=value,…`.
///
/// Errors: as `blockdev-add`.
pub(crate) fn parse_blockdev(text: &str) -> Result<BlockdevOptions, QmpError> {
    blockdev_options(Args::from_option(text, Some("driver"))?)
}

/// Reads the options of a node that somebody will refer to, so it has to have a
/// name.
///
/// Errors: a missing, unknown or ill-typed option, in QEMU's words.
fn blockdev_options(args: Args) -> Result<BlockdevOptions, QmpError> {
    let options = node_options(args, &Common::default())?;
    if options.node_name.is_none() {
        return Err(QmpError::generic(
            "'node-name' must be specified for the root node",
        ));
    }
    Ok(options)
}

/// Reads the options of a node that somebody else names and owns.
///
/// Errors: as `blockdev-add`.
pub(super) fn inner_options(
    options: serde_json::Map<String, serde_json::Value>,
) -> Result<BlockdevOptions, QmpError> {
    node_options(Args::new(options), &Common::default())
}

/// Options of any node that the options of its driver depend on: a child opened with
/// its parent takes them from it where it says nothing.
#[derive(Clone, Copy, Default)]
struct Common {
    /// `cache.direct`
    direct: bool,
    /// How many nodes it is inside of.
    depth: usize,
}

/// Options inside options: more than the graph takes, and not too many for the stack.
const MAX_DEPTH: usize = 128;

/// Reads the options of one node, and of those that are opened with it.
fn node_options(mut args: Args, parent: &Common) -> Result<BlockdevOptions, QmpError> {
    if parent.depth >= MAX_DEPTH {
        return Err(QmpError::generic(format!(
            "More than {MAX_DEPTH} nodes are inside one another"
        )));
    }
    let written = match args.written_without(NOT_THE_DRIVERS) {
        Some(members) => Written::new(members),
        None => Written::default(),
    };
    let read_driver = args.required_enum("driver", DRIVERS)?;
    let node_name = args.optional_str("node-name")?;
    let discard = args.optional_enum(
        "discard",
        &[
            ("ignore", DiscardMode::Ignore),
            ("unmap", DiscardMode::Unmap),
        ],
    )?;
    let cache = match args.optional_object("cache")? {
        Some(args) => cache_choice(args)?,
        None => CacheChoice::default(),
    };
    let read_only = args.optional_bool("read-only")?;
    let auto_read_only = args.optional_bool("auto-read-only")?;
    if args.optional_bool("force-share")? == Some(true) {
        let text = match read_only {
            Some(true) => "Parameter 'force-share' is not supported here; leave it out",
            _ => "force-share=on can only be used with read-only images",
        };
        args.refuse(QmpError::generic(text));
    }
    let detect_zeroes = args
        .optional_enum(
            "detect-zeroes",
            &[
                ("off", DetectZeroes::Off),
                ("on", DetectZeroes::On),
                ("unmap", DetectZeroes::Unmap),
            ],
        )?
        .unwrap_or_default();
    let common = Common {
        direct: cache.direct.unwrap_or(parent.direct),
        depth: parent.depth + 1,
    };
    let driver = read_driver(&mut args, &common)?;
    let said = telling_options(&driver, args.said());
    args.finish()?;
    Ok(BlockdevOptions {
        node_name,
        read_only,
        auto_read_only,
        cache,
        discard,
        detect_zeroes,
        driver,
        said,
        written,
    })
}

/// Of what was `said`, what makes the node another one than others of its driver.
fn telling_options(
    driver: &DriverOptions,
    said: Vec<(String, Value)>,
) -> Vec<(String, OptionValue)> {
    let names: &[&str] = match driver {
        DriverOptions::NullCo(_) => &["size", "read-zeroes"],
        DriverOptions::Raw(_) => &["offset", "size"],
        DriverOptions::Blkdebug(_) => blkdebug::TELLING,
        _ => return Vec::new(),
    };
    let tells = |name: &str| {
        let list = name.split_once('[').map(|(list, _)| list);
        names.contains(&name) || list.is_some_and(|list| blkdebug::RULES.contains(&list))
    };
    let said = said.into_iter().filter(|(name, _)| tells(name));
    let said = said.filter_map(|(name, value)| {
        let value = match value {
            Value::Bool(value) => OptionValue::Bool(value),
            Value::Number(value) => OptionValue::Int(value.as_i64()?),
            Value::String(value) => OptionValue::Text(value),
            _ => return None,
        };
        // `rules[0].event` is `rules.0.event` there.
        Some((name.replace('[', ".").replace(']', ""), value))
    });
    said.collect()
}

/// Reads a child: the name of a node, or the options of one to be opened.
fn child(args: &mut Args, role: &str, inherited: &Common) -> Result<BlockdevRef, QmpError> {
    Ok(match args.required_string_or_object(role, "BlockdevRef")? {
        StringOrObject::String(name) => BlockdevRef::Name(name),
        StringOrObject::Object(args) => {
            BlockdevRef::Inline(Box::new(node_options(args, inherited)?))
        }
    })
}

/// Reads a child that need not be there.
fn optional_child(
    args: &mut Args,
    role: &str,
    inherited: &Common,
) -> Result<Option<BlockdevRef>, QmpError> {
    match args.is_given(role) {
        true => child(args, role, inherited).map(Some),
        false => Ok(None),
    }
}

/// Reads the backing image of a format: a child, or null for none.
fn backing(args: &mut Args, inherited: &Common) -> Result<BackingRef, QmpError> {
    Ok(
        match args.optional_string_object_or_null("backing", "BlockdevRefOrNull")? {
            None => BackingRef::Header,
            Some(None) => BackingRef::None,
            // Deprecated by QEMU, and still used.
            Some(Some(StringOrObject::String(name))) if name.is_empty() => BackingRef::None,
            Some(Some(StringOrObject::String(name))) => BackingRef::Node(BlockdevRef::Name(name)),
            Some(Some(StringOrObject::Object(args))) => BackingRef::Node(BlockdevRef::Inline(
                Box::new(node_options(args, inherited)?),
            )),
        },
    )
}

fn cache_choice(mut args: Args) -> Result<CacheChoice, QmpError> {
    let direct = args.optional_bool("direct")?;
    let no_flush = args.optional_bool("no-flush")?;
    args.finish()?;
    Ok(CacheChoice { direct, no_flush })
}
