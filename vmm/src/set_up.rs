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

use crate::monitor::{
    HelpTopic, Monitor, ObjectOptions, QmpError, object_help, option_help, parse_blockdev,
    parse_object,
};

/// Reads an option, and tells what there is where help is asked for, whatever else is
/// missing on the command line.
#[derive(Clone, Debug)]
pub(crate) struct HelpfulParser<T, E> {
    /// `None`: no help is asked for.
    pub(crate) help: fn(&str) -> Option<String>,
    pub(crate) parse: fn(&str) -> Result<T, E>,
}

/// Reads `--object`.
pub(crate) const OBJECT_PARSER: HelpfulParser<ObjectOptions, QmpError> = HelpfulParser {
    help: object_help,
    parse: parse_object,
};

/// Reads `--blockdev`.
pub(crate) const BLOCKDEV_PARSER: HelpfulParser<BlockdevOptions, QmpError> = HelpfulParser {
    help: |text| option_help(HelpTopic::Blockdev, text),
    parse: parse_blockdev,
};

impl<T, E> TypedValueParser for HelpfulParser<T, E>
where
    T: Clone + Send + Sync + 'static,
    E: std::error::Error + Clone + Send + Sync + 'static,
{
    type Value = T;

    fn parse_ref(
        &self,
        command: &Command,
        argument: Option<&Arg>,
        value: &OsStr,
    ) -> Result<T, clap::Error> {
        if let Some(help) = value.to_str().and_then(self.help) {
            return Err(clap::Error::raw(ErrorKind::DisplayHelp, help));
        }
        let parse = self.parse;
        let parser = move |text: &str| parse(text);
        parser.parse_ref(command, argument, value)
    }
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
