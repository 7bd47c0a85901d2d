//! What `diptych run` and `diptych storage-daemon` both set up from their command
//! lines: objects and nodes, said as `object-add` and `blockdev-add` have them.
//!
//! What the options mean is the [monitor's](crate::monitor) matter.

use std::ffi::OsStr;
use std::rc::Rc;

use anyhow::Context;
use block::{BlockdevOptions, Graph};
use clap::builder::TypedValueParser;
use clap::error::ErrorKind;
use clap::{Arg, Command};

use crate::monitor::{Monitor, ObjectOptions, QmpError, object_help, parse_blockdev, parse_object};

/// Reads `--object`, and tells what there is where help is asked for, whatever else is
/// missing on the command line.
#[derive(Clone, Debug)]
pub(crate) struct ObjectParser;

impl TypedValueParser for ObjectParser {
    type Value = ObjectOptions;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<ObjectOptions, clap::Error> {
        if let Some(help) = value.to_str().and_then(object_help) {
            return Err(clap::Error::raw(ErrorKind::DisplayHelp, help));
        }
        let parser = |text: &str| parse_object(text);
        parser.parse_ref(command, argument, value)
    }
}

/// Reads `--blockdev`.
pub(crate) fn blockdev_parser(text: &str) -> Result<BlockdevOptions, QmpError> {
    parse_blockdev(text)
}

/// Makes an object.
pub(crate) fn add_object(monitor: &Monitor, options: ObjectOptions) -> anyhow::Result<()> {
    let id = options.id().to_owned();
    let added = monitor.objects().add(options);
    added.with_context(|| format!("Cannot make object '{id}'"))
}

/// Opens a node.
pub(crate) async fn add_node(graph: &Rc<Graph>, options: BlockdevOptions) -> anyhow::Result<()> {
    let name = options.node_name.clone().unwrap_or_default();
    let added = graph.blockdev_add(options).await;
    added.with_context(|| format!("Cannot add node '{name}'"))?;
    Ok(())
}
