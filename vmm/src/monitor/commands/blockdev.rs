//! `blockdev-add`, `blockdev-del`, and the options of a node on the wire.

use std::path::PathBuf;
use std::rc::Rc;

use block::{
    BlockdevOptions, BlockdevRef, CacheOptions, DetectZeroes, DiscardMode, DriverOptions,
    FileOptions, NullCoOptions, RawOptions,
};
use serde_json::Value;

use super::{Outcome, bounded, done};
use crate::monitor::Monitor;
use crate::monitor::args::{Args, StringOrObject};
use crate::monitor::error::QmpError;
use crate::monitor::json::{Limits, Reader};

#[cfg(test)]
mod tests;

pub(super) async fn blockdev_add(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let options = blockdev_options(args)?;
    let _alone = monitor.graph_commands.lock().await;
    bounded("Opening the node", monitor.graph.blockdev_add(options))
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

/// Drivers by QMP's names.
#[derive(Clone, Copy)]
enum Driver {
    File,
    HostDevice,
    NullCo,
    Raw,
}

const DRIVERS: &[(&str, Driver)] = &[
    ("file", Driver::File),
    ("host_device", Driver::HostDevice),
    ("null-co", Driver::NullCo),
    ("raw", Driver::Raw),
];

/// What QEMU may do I/O with. All I/O here goes through io_uring.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Aio {
    Threads,
    Native,
    IoUring,
}

/// Reads `--blockdev`: JSON if it begins with a brace, else `key=value,…`.
///
/// Errors: as `blockdev-add`.
pub(crate) fn parse_blockdev(text: &str) -> Result<BlockdevOptions, QmpError> {
    if !text.trim_start().starts_with('{') {
        return blockdev_options(Args::from_keyval(text)?);
    }
    let mut reader = Reader::new(Limits::default());
    let mut rest = text.as_bytes();
    match reader.next(&mut rest) {
        Some(Ok(Value::Object(members))) if rest.trim_ascii().is_empty() => {
            blockdev_options(Args::new(members))
        }
        Some(Err(error)) => Err(QmpError::generic(error.to_string())),
        _ => Err(QmpError::generic("Expecting one JSON object")),
    }
}

/// Reads the options of a node that somebody will refer to, so it has to have a
/// name.
///
/// Errors: a missing, unknown or ill-typed option, in QEMU's words.
fn blockdev_options(args: Args) -> Result<BlockdevOptions, QmpError> {
    let options = node_options(args, &Inherited::default())?;
    if options.node_name.is_none() {
        return Err(QmpError::generic(
            "'node-name' must be specified for the root node",
        ));
    }
    Ok(options)
}

/// What a child opened with its parent takes from it where it says nothing.
#[derive(Clone, Copy, Default)]
struct Inherited {
    read_only: Option<bool>,
    auto_read_only: bool,
    cache: CacheOptions,
    discard: DiscardMode,
}

/// Reads the options of one node, and of those that are opened with it.
fn node_options(mut args: Args, parent: &Inherited) -> Result<BlockdevOptions, QmpError> {
    let driver = args.required_enum("driver", DRIVERS)?;
    let node_name = args.optional_str("node-name")?;
    let discard = args
        .optional_enum(
            "discard",
            &[
                ("ignore", DiscardMode::Ignore),
                ("off", DiscardMode::Ignore),
                ("unmap", DiscardMode::Unmap),
                ("on", DiscardMode::Unmap),
            ],
        )?
        .unwrap_or(parent.discard);
    let cache = match args.optional_object("cache")? {
        Some(args) => cache_options(args, parent.cache)?,
        None => parent.cache,
    };
    let read_only = args.optional_bool("read-only")?.or(parent.read_only);
    let auto_read_only = args
        .optional_bool("auto-read-only")?
        .unwrap_or(parent.auto_read_only);
    if args.optional_bool("force-share")? == Some(true) {
        return Err(QmpError::generic(
            "Parameter 'force-share' is not supported here; leave it out",
        ));
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
    let driver = match driver {
        Driver::File => DriverOptions::File(file_options(&mut args, &cache, false)?),
        Driver::HostDevice => DriverOptions::File(file_options(&mut args, &cache, true)?),
        Driver::NullCo => DriverOptions::NullCo(null_co_options(&mut args)?),
        Driver::Raw => {
            // The parent decides about discards; what it lets through is done.
            let inherited = Inherited {
                read_only,
                auto_read_only,
                cache,
                discard: DiscardMode::Unmap,
            };
            DriverOptions::Raw(raw_options(&mut args, &inherited)?)
        }
    };
    args.finish()?;
    if detect_zeroes == DetectZeroes::Unmap && discard != DiscardMode::Unmap {
        return Err(QmpError::generic(
            "setting detect-zeroes to unmap is not allowed without setting discard operation \
             to unmap",
        ));
    }
    Ok(BlockdevOptions {
        node_name,
        read_only,
        auto_read_only,
        cache,
        discard,
        detect_zeroes,
        driver,
    })
}

fn cache_options(mut args: Args, parent: CacheOptions) -> Result<CacheOptions, QmpError> {
    let direct = args.optional_bool("direct")?.unwrap_or(parent.direct);
    let no_flush = args.optional_bool("no-flush")?.unwrap_or(parent.no_flush);
    args.finish()?;
    Ok(CacheOptions { direct, no_flush })
}

fn file_options(
    args: &mut Args,
    cache: &CacheOptions,
    host_device: bool,
) -> Result<FileOptions, QmpError> {
    let filename = args.required_str("filename")?;
    let locking = args
        .optional_enum(
            "locking",
            &[("auto", None), ("on", Some(true)), ("off", Some(false))],
        )?
        .flatten();
    let aio = args.optional_enum(
        "aio",
        &[
            ("threads", Aio::Threads),
            ("native", Aio::Native),
            ("io_uring", Aio::IoUring),
        ],
    )?;
    if aio == Some(Aio::Native) && !cache.direct {
        return Err(QmpError::generic(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    if filename.is_empty() {
        let driver = if host_device { "host_device" } else { "file" };
        return Err(QmpError::generic(format!(
            "The '{driver}' block driver requires a file name"
        )));
    }
    Ok(FileOptions {
        filename: PathBuf::from(filename),
        locking,
        host_device,
    })
}

fn null_co_options(args: &mut Args) -> Result<NullCoOptions, QmpError> {
    const DEFAULT_SIZE: u64 = 1 << 30;
    let size = args.optional_non_negative("size")?;
    let latency_ns = args.optional_u64("latency-ns")?.unwrap_or(0);
    let read_zeroes = args.optional_bool("read-zeroes")?.unwrap_or(false);
    if i64::try_from(latency_ns).is_err() {
        return Err(QmpError::generic("latency-ns is invalid"));
    }
    Ok(NullCoOptions {
        size: size.unwrap_or(DEFAULT_SIZE),
        latency_ns,
        read_zeroes,
    })
}

fn raw_options(args: &mut Args, inherited: &Inherited) -> Result<RawOptions, QmpError> {
    let file = match args.required_string_or_object("file", "BlockdevRef")? {
        StringOrObject::String(name) => BlockdevRef::Name(name),
        StringOrObject::Object(args) => {
            BlockdevRef::Inline(Box::new(node_options(args, inherited)?))
        }
    };
    let offset = args.optional_non_negative("offset")?.unwrap_or(0);
    let size = args.optional_non_negative("size")?;
    Ok(RawOptions { file, offset, size })
}
