//! Steps of drivers that a test may want to meet: `blkdebug`'s events.

/// A step inside a driver, told to the node below it, or to the node itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugEvent(&'static str);

impl DebugEvent {
    /// A node is opened.
    pub const NONE: Self = Self("none");
    /// The node above is about to read data from this one.
    pub const READ_AIO: Self = Self("read_aio");
    /// The node above is about to write data to this one.
    pub const WRITE_AIO: Self = Self("write_aio");
    /// The node above has begun a flush.
    pub const FLUSH_TO_OS: Self = Self("flush_to_os");
    /// The node above is about to flush this one.
    pub const FLUSH_TO_DISK: Self = Self("flush_to_disk");
    /// The node itself is about to write data.
    pub const PWRITEV: Self = Self("pwritev");
    /// The node itself is about to write zeroes.
    pub const PWRITEV_ZERO: Self = Self("pwritev_zero");
    /// The node itself has written data or zeroes.
    pub const PWRITEV_DONE: Self = Self("pwritev_done");

    /// The names that QEMU knows. Formats may tell more of them than this crate's
    /// own drivers do.
    const NAMES: [&'static str; 48] = [
        "l1_update",
        "l1_grow_alloc_table",
        "l1_grow_write_table",
        "l1_grow_activate_table",
        "l2_load",
        "l2_update",
        "l2_update_compressed",
        "l2_alloc_cow_read",
        "l2_alloc_write",
        "read_aio",
        "read_backing_aio",
        "read_compressed",
        "write_aio",
        "write_compressed",
        "vmstate_load",
        "vmstate_save",
        "cow_read",
        "cow_write",
        "reftable_load",
        "reftable_grow",
        "reftable_update",
        "refblock_load",
        "refblock_update",
        "refblock_update_part",
        "refblock_alloc",
        "refblock_alloc_hookup",
        "refblock_alloc_write",
        "refblock_alloc_write_blocks",
        "refblock_alloc_write_table",
        "refblock_alloc_switch_table",
        "cluster_alloc",
        "cluster_alloc_bytes",
        "cluster_free",
        "flush_to_os",
        "flush_to_disk",
        "pwritev_rmw_head",
        "pwritev_rmw_after_head",
        "pwritev_rmw_tail",
        "pwritev_rmw_after_tail",
        "pwritev",
        "pwritev_zero",
        "pwritev_done",
        "empty_image_prepare",
        "l1_shrink_write_table",
        "l1_shrink_free_l2_clusters",
        "cor_write",
        "cluster_alloc_space",
        "none",
    ];

    /// The event of that name; `None`: there is none.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES
            .into_iter()
            .find(|known| *known == name)
            .map(Self)
    }
}
