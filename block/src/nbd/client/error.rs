//! Why a server's export cannot be used, or can be used no longer.
//!
//! Texts that QEMU's clients know are QEMU's, word for word.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::os_text;
use crate::nbd::protocol::{ProtocolError, option, option_reply};
use crate::options::SocketAddress;
use crate::runtime::RuntimeError;

/// Why an export cannot be opened, or a connection has ended.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// A name that cannot be looked up.
    #[error("address resolution failed for {host}:{port}: {reason}")]
    Resolve {
        /// Host as given.
        host: String,
        /// Port as given.
        port: String,
        /// What the resolver says.
        reason: String,
    },
    /// A path that does not fit a socket address.
    #[error("UNIX socket path '{}' is too long", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// Nobody answers there.
    #[error("Failed to connect to '{address}': {}", io_text(error))]
    Connect {
        /// The server's address.
        address: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// The connection broke, or ended, in the middle of something.
    #[error("Failed to read {what}: {}", io_text(error))]
    Read {
        /// What should have come.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The connection broke while something was sent.
    #[error("Failed to send {what}: {}", io_text(error))]
    Send {
        /// What was sent.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
    },
    /// The server takes too long.
    #[error("NBD server '{address}' did not offer export '{export}' within {} seconds", .waited.as_secs())]
    Timeout {
        /// The server's address.
        address: String,
        /// The export's name.
        export: String,
        /// How long it was given.
        waited: Duration,
    },
    /// The greeting is not that of an NBD server.
    #[error("Bad initial magic received: {0:#x}")]
    InitialMagic(u64),
    /// The greeting is of no kind that is known.
    #[error("Bad server magic received: {0:#x}")]
    ServerMagic(u64),
    /// A server of the first kind has one export without a name.
    #[error("Server does not support non-empty export names")]
    OldServer,
    /// An export name that the protocol does not allow.
    #[error("export name too long to send to server")]
    ExportNameTooLong,
    /// A name of a context that the protocol does not allow.
    #[error("x-dirty-bitmap query too long to send to server")]
    ContextTooLong,
    /// The server does not tell the block status that was asked for.
    #[error(
        "Requested x-dirty-bitmap '{0}' not found: the export has no such context, or the server \
         tells no block status"
    )]
    NoContext(String),
    /// Something else where a reply to an option should be.
    #[error("Unexpected option reply magic")]
    ReplyMagic,
    /// A reply to another option.
    #[error(
        "Unexpected option type {found} ({}), expected {expected} ({})",
        option_name(*found),
        option_name(*expected)
    )]
    ReplyOption {
        /// Which option was answered.
        found: u32,
        /// Which was asked.
        expected: u32,
    },
    /// A reply that has no place there.
    #[error(
        "unexpected reply type {found} ({}), expected {} ({})",
        reply_name(*found),
        option_reply::INFO,
        reply_name(option_reply::INFO)
    )]
    ReplyType {
        /// What was answered.
        found: u32,
    },
    /// A reply that has no place there, to an option that has but one answer.
    #[error(
        "Server answered option {option} ({}) with unexpected reply {found} ({})",
        option_name(*option),
        reply_name(*found)
    )]
    UnexpectedReply {
        /// The option.
        option: u32,
        /// What was answered.
        found: u32,
    },
    /// The server refuses an option.
    #[error("{}", refusal(*option, *reply))]
    Refused {
        /// The option.
        option: u32,
        /// Its answer, an error.
        reply: u32,
        /// What it says to people.
        message: String,
    },
    /// An acknowledgement with data.
    #[error("server sent invalid NBD_REP_ACK")]
    BadAck,
    /// The server never says what the export is.
    #[error("broken server omitted NBD_INFO_EXPORT")]
    NoExportInfo,
    /// An `INFO` reply without its type.
    #[error("NBD_REP_INFO length {0} is too short")]
    ShortInfo(u32),
    /// An `INFO_EXPORT` of another length.
    #[error("remaining export info len {0} is unexpected size")]
    ExportInfoLength(u32),
    /// An `INFO_BLOCK_SIZE` of another length.
    #[error("remaining export info len {0} is unexpected size")]
    BlockSizeLength(u32),
    /// A minimum block size that cannot be.
    #[error("server minimum block size {0} is not a power of two")]
    MinimumBlockSize(u32),
    /// A minimum block size that the specification forbids.
    #[error("server minimum block size {found} is larger than {limit}")]
    LargeBlockSize {
        /// What the server wants.
        found: u32,
        /// The most that it may.
        limit: u32,
    },
    /// A preferred block size that cannot be.
    #[error("server preferred block size {0} is not valid")]
    PreferredBlockSize(u32),
    /// A largest payload that nothing fits into.
    #[error("server maximum block size {0} is not valid")]
    MaximumBlockSize(u32),
    /// More than a disk can have.
    #[error("Could not refresh total sector count: {}", io_text(&io::Error::from_raw_os_error(libc::EFBIG)))]
    TooLarge,
    /// The last block of the export is not whole, and could not be reached.
    #[error("export length {size} is not multiple of minimum block size {block}")]
    PartialBlock {
        /// Size of the export in bytes.
        size: u64,
        /// Its smallest block in bytes.
        block: u32,
    },
    /// The export can only be read, and the node is to be written.
    #[error("Could not open image: {}", io_text(&io::Error::from_raw_os_error(libc::EACCES)))]
    ReadOnly,
    /// The export can only be read, and the node is to become writable.
    #[error("Can't reopen read-only NBD mount as read/write")]
    ReopenReadOnly,
    /// More replies than anybody needs.
    #[error("Server sent too many replies to option {option} ({})", option_name(*option))]
    TooManyReplies {
        /// The option.
        option: u32,
    },
    /// A reply with more data than it can have.
    #[error("Server's reply to option {option} ({}) has {len} bytes, too many", option_name(*option))]
    LongReply {
        /// The option.
        option: u32,
        /// Length in bytes.
        len: u32,
    },
    /// Bytes that make no sense.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// A reply to a request that breaks the rules.
    #[error("The server broke the protocol: {0}")]
    Violation(&'static str),
    /// The server does not answer, and nobody wants to wait for it.
    #[error("The server does not answer, and the requests to it were cancelled")]
    Silent,
    /// The export is not what it was when it was opened.
    #[error("The export has changed since it was opened: {0}")]
    Changed(&'static str),
    /// No thread for the connection.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

impl NbdError {
    /// What the server says of its refusal.
    pub(super) fn reason(&self) -> Option<&str> {
        match self {
            Self::Refused { message, .. } if !message.is_empty() => Some(message),
            _ => None,
        }
    }

    pub(super) fn connect(address: &SocketAddress, error: io::Error) -> Self {
        Self::Connect {
            address: address.to_string(),
            error,
        }
    }
}

/// The kernel's text, or QEMU's where the kernel has none.
fn io_text(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return "Unexpected end-of-file before all data were read".to_owned();
    }
    os_text(error)
}

fn option_name(number: u32) -> &'static str {
    match number {
        option::EXPORT_NAME => "export name",
        option::ABORT => "abort",
        option::LIST => "list",
        option::STARTTLS => "starttls",
        option::INFO => "info",
        option::GO => "go",
        option::STRUCTURED_REPLY => "structured reply",
        option::LIST_META_CONTEXT => "list meta context",
        option::SET_META_CONTEXT => "set meta context",
        option::EXTENDED_HEADERS => "extended headers",
        _ => "<unknown>",
    }
}

fn reply_name(number: u32) -> &'static str {
    match number {
        option_reply::ACK => "ack",
        option_reply::SERVER => "server",
        option_reply::INFO => "info",
        option_reply::META_CONTEXT => "meta context",
        option_reply::ERR_UNSUP => "unsupported",
        option_reply::ERR_POLICY => "denied by policy",
        option_reply::ERR_INVALID => "invalid",
        option_reply::ERR_PLATFORM => "platform lacks support",
        option_reply::ERR_TLS_REQD => "TLS required",
        option_reply::ERR_UNKNOWN => "export unknown",
        option_reply::ERR_SHUTDOWN => "server shutting down",
        option_reply::ERR_BLOCK_SIZE_REQD => "block size required",
        option_reply::ERR_TOO_BIG => "option payload too big",
        _ => "<unknown>",
    }
}

fn refusal(option: u32, reply: u32) -> String {
    let option = format!("option {option} ({})", option_name(option));
    match reply {
        option_reply::ERR_POLICY => format!("Denied by server for {option}"),
        option_reply::ERR_INVALID => format!("Invalid parameters for {option}"),
        option_reply::ERR_PLATFORM => format!("Server lacks support for {option}"),
        option_reply::ERR_TLS_REQD => format!("TLS negotiation required before {option}"),
        option_reply::ERR_UNKNOWN => "Requested export not available".to_owned(),
        option_reply::ERR_SHUTDOWN => format!("Server shutting down before {option}"),
        option_reply::ERR_BLOCK_SIZE_REQD => {
            format!("Server requires INFO_BLOCK_SIZE for {option}")
        }
        _ => format!("Unknown error code when asking for {option}"),
    }
}
