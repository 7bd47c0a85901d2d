//! Exports and the NBD server: commands, and the same options on the command line.

use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use block::{
    BitmapRef, DeleteMode, ExportIothread, ExportKind, ExportOptions, ListenAddress,
    NbdServerOptions,
};
use serde_json::{Value, json};

use super::{Outcome, bounded, done};
use crate::inherited;
use crate::monitor::Monitor;
use crate::monitor::args::{Args, StringOrObject};
use crate::monitor::error::QmpError;

#[cfg(test)]
mod tests;

/// How long `nbd-server-stop` waits for requests in flight. The server has stopped in
/// any case; exports that wait longer go later.
const STOP_TIME: Duration = Duration::from_secs(10);

const DELETE_MODES: &[(&str, DeleteMode)] =
    &[("safe", DeleteMode::Safe), ("hard", DeleteMode::Hard)];

/// How a socket address is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AddressForm {
    /// `{type, data: {…}}`: the commands'.
    Nested,
    /// `{type, …}`: the command line's.
    Flat,
}

/// Where an NBD server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Address {
    Unix {
        path: PathBuf,
    },
    Inet {
        host: String,
        port: String,
        to: Option<u16>,
        ipv4: Option<bool>,
        ipv6: Option<bool>,
    },
    /// The number of an inherited descriptor.
    Fd(u32),
}

/// An NBD server to be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NbdServerArgs {
    address: Address,
    tls_creds: Option<String>,
    max_connections: u32,
}

/// An export to be made, as users say it: its iothread by name.
#[derive(Clone, Debug)]
pub(crate) struct ExportArgs {
    id: String,
    node_name: String,
    writable: bool,
    writethrough: bool,
    iothread: Option<String>,
    kind: ExportKind,
}

impl ExportArgs {
    /// Its id.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}

/// Reads `--nbd-server`: JSON, or `addr.type=unix,addr.path=…`.
///
/// Errors: as `nbd-server-start`, as far as they are about the text.
pub(crate) fn parse_nbd_server(text: &str) -> Result<NbdServerArgs, QmpError> {
    nbd_server_args(Args::from_option(text, None)?, AddressForm::Flat)
}

/// Reads `--export`: JSON, or `TYPE,id=…,node-name=…`.
///
/// Errors: as `block-export-add`, as far as they are about the text.
pub(crate) fn parse_export(text: &str) -> Result<ExportArgs, QmpError> {
    export_args(Args::from_option(text, Some("type"))?)
}

impl Monitor {
    /// Starts the NBD server. Cancel: it is not started.
    pub(crate) async fn start_nbd_server(&self, args: NbdServerArgs) -> Result<(), QmpError> {
        let exports = self.exports();
        if exports.nbd_server_running() {
            return Err(block::ExportError::ServerRunning.into());
        }
        let address = match args.address {
            Address::Unix { path } => ListenAddress::Unix { path },
            Address::Inet {
                host,
                port,
                to,
                ipv4,
                ipv6,
            } => ListenAddress::Inet {
                host,
                port,
                to,
                ipv4,
                ipv6,
            },
            Address::Fd(number) => ListenAddress::inherited(number).map_err(|error| {
                QmpError::generic(format!("Cannot use file descriptor {number}: {error}"))
            })?,
        };
        if let Some(id) = args.tls_creds {
            // What is wrong with the address is told first.
            let check = bounded("Starting the NBD server", address.check());
            check.await?.map_err(block::ExportError::from)?;
            // No object can hold credentials.
            return Err(QmpError::generic(format!(
                "No TLS credentials with id '{id}'"
            )));
        }
        let start = exports.start_nbd_server(NbdServerOptions {
            address,
            max_connections: args.max_connections,
        });
        Ok(bounded("Starting the NBD server", start).await??)
    }

    /// Makes an export.
    pub(crate) fn add_export(&self, args: ExportArgs) -> Result<(), QmpError> {
        // Of several mistakes these are told first.
        self.exports()
            .check(&args.id, &args.node_name, args.writable)?;
        let iothread = match args.iothread {
            None => None,
            Some(name) => {
                let thread = self.objects().iothread(&name);
                let thread = thread
                    .ok_or_else(|| QmpError::generic(format!("iothread \"{name}\" not found")))?;
                Some(ExportIothread {
                    handle: (*thread).clone(),
                    hold: Box::new(thread),
                })
            }
        };
        self.exports().add(ExportOptions {
            id: args.id,
            node_name: args.node_name,
            writable: args.writable,
            writethrough: args.writethrough,
            iothread,
            kind: args.kind,
        })?;
        Ok(())
    }
}

pub(super) async fn nbd_server_start(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let args = nbd_server_args(args, AddressForm::Nested)?;
    monitor.start_nbd_server(args).await?;
    done()
}

pub(super) async fn nbd_server_stop(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let left = monitor.exports().stop_nbd_server(STOP_TIME).await?;
    if !left.is_empty() {
        tracing::warn!(
            exports = left.join(", "),
            "Exports still have requests in flight; they go when these have ended"
        );
    }
    done()
}

pub(super) async fn block_export_add(monitor: Rc<Monitor>, args: Args) -> Outcome {
    let args = export_args(args)?;
    monitor.add_export(args)?;
    done()
}

pub(super) async fn block_export_del(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let id = args.required_str("id")?;
    let mode = args.optional_enum("mode", DELETE_MODES)?;
    args.finish()?;
    let exports = Rc::clone(monitor.exports());
    exports.delete(&id, mode.unwrap_or_default()).await?;
    done()
}

pub(super) async fn query_block_exports(monitor: Rc<Monitor>, args: Args) -> Outcome {
    args.finish()?;
    let exports = monitor.exports().list();
    let exports = exports.iter().map(|export| {
        json!({
            "node-name": export.node_name,
            "shutting-down": export.shutting_down,
            "type": export.kind,
            "id": export.id,
        })
    });
    Ok(exports.collect::<Vec<Value>>().into())
}

/// The older form of `block-export-add`: a device's name will do, the export's name
/// is its id, and a node that cannot be written is exported read-only.
pub(super) async fn nbd_server_add(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let name = args.optional_str("name")?;
    let description = args.optional_str("description")?;
    let device = args.required_str("device")?;
    let writable = args.optional_bool("writable")?.unwrap_or(false);
    let bitmap = args.optional_str("bitmap")?;
    args.finish()?;
    let node = monitor.graph.find(&device)?;
    let name = name.unwrap_or(device);
    monitor.add_export(ExportArgs {
        id: name.clone(),
        node_name: node.name().to_owned(),
        writable: writable && !node.read_only(),
        writethrough: false,
        iothread: None,
        kind: ExportKind::Nbd {
            name: Some(name),
            description,
            allocation_depth: false,
            bitmaps: bitmap
                .map(|name| BitmapRef { node: None, name })
                .into_iter()
                .collect(),
        },
    })?;
    done()
}

pub(super) async fn nbd_server_remove(monitor: Rc<Monitor>, mut args: Args) -> Outcome {
    let name = args.required_str("name")?;
    let mode = args.optional_enum("mode", DELETE_MODES)?;
    args.finish()?;
    let exports = Rc::clone(monitor.exports());
    exports.delete(&name, mode.unwrap_or_default()).await?;
    done()
}

fn nbd_server_args(mut args: Args, form: AddressForm) -> Result<NbdServerArgs, QmpError> {
    let address = args.required_object("addr")?;
    let address = socket_address(address, form)?;
    let tls_creds = args.optional_str("tls-creds")?;
    // Says who of the clients with certificates may come; there are none.
    args.optional_str("tls-authz")?;
    let max_connections = args
        .optional_u32("max-connections")?
        .unwrap_or(NbdServerOptions::DEFAULT_MAX_CONNECTIONS);
    args.finish()?;
    Ok(NbdServerArgs {
        address,
        tls_creds,
        max_connections,
    })
}

/// Reads one kind of address from its own members.
type ReadAddress = fn(&mut Args, AddressForm) -> Result<Address, QmpError>;

const ADDRESSES: &[(&str, ReadAddress)] = &[
    ("inet", inet_address),
    ("unix", unix_address),
    ("vsock", vsock_address),
    ("fd", fd_address),
];

fn socket_address(mut args: Args, form: AddressForm) -> Result<Address, QmpError> {
    let read = args.required_enum("type", ADDRESSES)?;
    let address = match form {
        AddressForm::Flat => read(&mut args, form)?,
        AddressForm::Nested => {
            let mut data = args.required_object("data")?;
            let address = read(&mut data, form)?;
            data.finish()?;
            address
        }
    };
    args.finish()?;
    Ok(address)
}

fn inet_address(args: &mut Args, _form: AddressForm) -> Result<Address, QmpError> {
    let host = args.required_str("host")?;
    let port = args.required_str("port")?;
    // Ports are numbers in any case.
    args.optional_bool("numeric")?;
    let to = match args.optional_u64("to")?.map(u16::try_from) {
        None => None,
        Some(Ok(to)) => Some(to),
        Some(Err(_)) => return Err(QmpError::expects("to", "uint16_t")),
    };
    let ipv4 = args.optional_bool("ipv4")?;
    let ipv6 = args.optional_bool("ipv6")?;
    // Clients' connections are always watched.
    args.optional_bool("keep-alive")?;
    if args.optional_bool("mptcp")? == Some(true) {
        return Err(QmpError::generic(
            "Multipath TCP is not supported here; leave 'mptcp' out",
        ));
    }
    Ok(Address::Inet {
        host,
        port,
        to,
        ipv4,
        ipv6,
    })
}

fn unix_address(args: &mut Args, _form: AddressForm) -> Result<Address, QmpError> {
    let path = PathBuf::from(args.required_str("path")?);
    let is_abstract = args.optional_bool("abstract")?.unwrap_or(false);
    // Of abstract names only.
    args.optional_bool("tight")?;
    if is_abstract {
        return Err(QmpError::generic(
            "Abstract unix sockets are not supported here; give a path",
        ));
    }
    Ok(Address::Unix { path })
}

fn vsock_address(args: &mut Args, _form: AddressForm) -> Result<Address, QmpError> {
    args.required_str("cid")?;
    args.required_str("port")?;
    Err(QmpError::generic(
        "Addresses of type 'vsock' are not supported here; use 'unix' or 'inet'",
    ))
}

fn fd_address(args: &mut Args, form: AddressForm) -> Result<Address, QmpError> {
    let text = args.required_str("str")?;
    if form == AddressForm::Nested {
        // A monitor's clients have no way to pass one.
        return Err(QmpError::generic(
            "only QEMU supports file descriptor passing",
        ));
    }
    let number =
        inherited::number_of(&text).map_err(|error| QmpError::generic(error.to_string()))?;
    match u32::try_from(number) {
        Ok(number) => Ok(Address::Fd(number)),
        Err(_) => Err(QmpError::expects("addr.str", "a file descriptor")),
    }
}

fn export_args(mut args: Args) -> Result<ExportArgs, QmpError> {
    args.required_enum("type", &[("nbd", ())])?;
    let id = args.required_str("id")?;
    // A node belongs to no thread, so no export's thread has to follow it.
    args.optional_bool("fixed-iothread")?;
    let iothread = args.optional_str("iothread")?;
    let node_name = args.required_str("node-name")?;
    let writable = args.optional_bool("writable")?.unwrap_or(false);
    let writethrough = args.optional_bool("writethrough")?.unwrap_or(false);
    let name = args.optional_str("name")?;
    let description = args.optional_str("description")?;
    let bitmaps = args.optional_list_of_string_or_object("bitmaps", "BlockDirtyBitmapOrStr")?;
    let bitmaps = bitmaps.unwrap_or_default().into_iter().map(bitmap);
    let bitmaps = bitmaps.collect::<Result<_, _>>()?;
    let allocation_depth = args.optional_bool("allocation-depth")?.unwrap_or(false);
    args.finish()?;
    Ok(ExportArgs {
        id,
        node_name,
        writable,
        writethrough,
        iothread,
        kind: ExportKind::Nbd {
            name,
            description,
            allocation_depth,
            bitmaps,
        },
    })
}

fn bitmap(given: StringOrObject) -> Result<BitmapRef, QmpError> {
    match given {
        StringOrObject::String(name) => Ok(BitmapRef { node: None, name }),
        StringOrObject::Object(mut args) => {
            let node = args.required_str("node")?;
            let name = args.required_str("name")?;
            args.finish()?;
            Ok(BitmapRef {
                node: Some(node),
                name,
            })
        }
    }
}
