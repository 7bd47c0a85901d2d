//! Why something with exports is refused. Texts that QEMU has are QEMU's.

use crate::bitmaps::NamedBitmapError;
use crate::graph::GraphError;
use crate::nbd::server::ListenError;

/// A refused or failed operation on exports. Nothing has been changed.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The id is no identifier.
    #[error("Invalid block export id")]
    InvalidId,
    /// There is an export of that id.
    #[error("Block export id '{id}' is already in use")]
    IdInUse {
        /// The id.
        id: String,
    },
    /// Writing was asked for, and the node does not allow it.
    #[error("Cannot export read-only node as writable")]
    ReadOnlyNode,
    /// No such node, or others do not go with the export.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// There is no NBD server.
    #[error("NBD server not running")]
    ServerNotRunning,
    /// There is an NBD server.
    #[error("NBD server already running")]
    ServerRunning,
    /// The server cannot listen.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Another export of the server has that name.
    #[error("NBD server already has export named '{name}'")]
    NameInUse {
        /// The name.
        name: String,
    },
    /// The protocol does not allow such a name.
    #[error("export name '{name}' too long")]
    NameTooLong {
        /// The name.
        name: String,
    },
    /// The protocol does not allow such a description.
    #[error("description '{description}' too long")]
    DescriptionTooLong {
        /// The description.
        description: String,
    },
    /// The node and those below have no bitmap of that name.
    #[error("Bitmap '{name}' is not found")]
    BitmapNotFound {
        /// The name.
        name: String,
    },
    /// A bitmap records what others write, and clients could not know.
    #[error("Enabled bitmap '{name}' incompatible with readonly export")]
    BitmapRecords {
        /// The name.
        name: String,
    },
    /// A bitmap is not where it was said to be, or cannot be used.
    #[error(transparent)]
    Bitmap(#[from] NamedBitmapError),
    /// No export has that id.
    #[error("Export '{id}' is not found")]
    NotFound {
        /// The id.
        id: String,
    },
    /// Clients are connected, and were not to be cut off.
    #[error("export '{id}' still in use")]
    InUse {
        /// The id.
        id: String,
    },
    /// It is being deleted already.
    #[error("Export '{id}' is already shutting down")]
    ShuttingDown {
        /// The id.
        id: String,
    },
}
