//! Looks through an image as 'qemu-img check' does, and reads it without the driver.

use std::collections::HashMap;

/// What is wrong with an image.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// What loses data sooner or later.
    pub(super) errors: Vec<String>,
    /// Clusters that are counted and not in use.
    pub(super) leaks: usize,
}

/// An image whose tables are read one by one. What lies past its end is zero.
pub(super) struct Image<'a> {
    bytes: &'a [u8],
    cluster_bits: u32,
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;

impl<'a> Image<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut image = Self {
            bytes,
            cluster_bits: 0,
        };
        image.cluster_bits = image.u32(20);
        image
    }

    fn byte(&self, at: u64) -> u8 {
        self.bytes.get(at as usize).copied().unwrap_or(0)
    }

    fn u32(&self, at: u64) -> u32 {
        u32::from_be_bytes(std::array::from_fn(|i| self.byte(at + i as u64)))
    }

    fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(std::array::from_fn(|i| self.byte(at + i as u64)))
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let order = self.u32(96);
        let per_block_bits = self.cluster_bits + 3 - order;
        let index = cluster >> per_block_bits;
        if index >= u64::from(self.u32(56)) << (self.cluster_bits - 3) {
            return 0;
        }
        let block = self.u64(self.u64(48) + index * 8);
        if block == 0 {
            return 0;
        }
        let bytes = (1u64 << order) / 8;
        let at = block + (cluster & ((1 << per_block_bits) - 1)) * bytes;
        (0..bytes).fold(0, |count, i| count << 8 | u64::from(self.byte(at + i)))
    }

    /// Entries of the second level tables: index of the guest's cluster, and entry.
    fn mappings(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let per_table = 1u64 << (self.cluster_bits - 3);
        (0..u64::from(self.u32(36))).flat_map(move |index| {
            let table = self.u64(self.u64(40) + index * 8) & OFFSET;
            let entries = if table == 0 { 0 } else { per_table };
            (0..entries).map(move |i| (index * per_table + i, self.u64(table + i * 8)))
        })
    }

    /// All that refers to clusters, and whether it is counted.
    pub(super) fn check(&self) -> Report {
        let cluster = 1u64 << self.cluster_bits;
        let mut uses: HashMap<u64, Vec<String>> = HashMap::new();
        let mut add = |offset: u64, len: u64, what: String| {
            for index in offset >> self.cluster_bits..(offset + len).div_ceil(cluster) {
                uses.entry(index).or_default().push(what.clone());
            }
        };
        add(0, 1, "header".into());
        let (reftable, clusters) = (self.u64(48), u64::from(self.u32(56)));
        add(reftable, clusters * cluster, "reference count table".into());
        let mut blocks = 0;
        for index in 0..clusters * cluster / 8 {
            let block = self.u64(reftable + index * 8);
            if block != 0 {
                blocks = index + 1;
                add(block, cluster, format!("reference count block {index}"));
            }
        }
        let (l1, entries) = (self.u64(40), u64::from(self.u32(36)));
        add(l1, entries * 8, "first level table".into());
        let mut report = Report::default();
        for index in 0..entries {
            let entry = self.u64(l1 + index * 8);
            if entry & OFFSET != 0 {
                add(
                    entry & OFFSET,
                    cluster,
                    format!("second level table {index}"),
                );
                if entry & COPIED == 0 {
                    report.errors.push(format!("table {index} is not alone"));
                }
            }
        }
        for (guest, entry) in self.mappings() {
            if entry & OFFSET != 0 {
                add(entry & OFFSET, cluster, format!("guest's cluster {guest}"));
                if entry & COPIED == 0 {
                    report.errors.push(format!("cluster {guest} is not alone"));
                }
            }
        }
        for (index, users) in &uses {
            let count = self.refcount(*index);
            if count < users.len() as u64 {
                report.errors.push(format!(
                    "cluster {index} counted {count}, used by {users:?}"
                ));
            }
        }
        let counted = blocks << (self.cluster_bits + 3 - self.u32(96));
        report.leaks = (0..counted)
            .filter(|index| self.refcount(*index) > 0 && !uses.contains_key(index))
            .count();
        report
    }

    /// First byte of each sector of the disk, as a guest reads it without a backing
    /// image.
    pub(super) fn sectors(&self) -> Vec<u8> {
        self.sectors_over(|_| 0)
    }

    /// As [`sectors`](Self::sectors), where a backing image has these.
    pub(super) fn sectors_over(&self, below: impl Fn(usize) -> u8) -> Vec<u8> {
        let mut sectors: Vec<u8> = (0..(self.u64(24) / 512) as usize).map(below).collect();
        let per_cluster = (1usize << self.cluster_bits) / 512;
        for (guest, entry) in self.mappings() {
            let zero = entry & 1 != 0;
            if entry & OFFSET == 0 && !zero {
                continue;
            }
            for within in 0..per_cluster {
                if let Some(sector) = sectors.get_mut(guest as usize * per_cluster + within) {
                    *sector = match zero {
                        true => 0,
                        false => self.byte((entry & OFFSET) + within as u64 * 512),
                    };
                }
            }
        }
        sectors
    }
}
