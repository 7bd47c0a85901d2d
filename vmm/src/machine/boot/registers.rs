//! Register contents of the first vCPU at a kernel's entry.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::super::layout;

/// The GDT of the 64-bit entry: null, unused, `__BOOT_CS` and `__BOOT_DS`,
/// flat, at the selectors that Linux expects.
pub(super) const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// Page table entry: present, writable.
pub(super) const PTE_PRESENT_WRITABLE: u64 = 0b11;
/// Page directory entry: a 2 MiB page.
pub(super) const PDE_2M: u64 = 1 << 7;

const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS bit 1 is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Code: execute, read, accessed.
const TYPE_CODE: u8 = 0xb;
/// Data: read, write, accessed.
const TYPE_DATA: u8 = 0x3;
/// 32/64-bit task state segment, busy.
const TYPE_TSS: u8 = 0xb;

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, `hvm_start_info` in EBX.
    Pvh {
        /// Physical address of the entry.
        entry: u32,
    },
    /// Long mode with an identity map, the boot parameters in RSI.
    Linux64 {
        /// Physical address of the entry.
        entry: u64,
    },
}

impl Entry {
    /// The general registers at this entry.
    pub fn regs(self) -> kvm_regs {
        match self {
            Self::Pvh { entry } => kvm_regs {
                rip: u64::from(entry),
                rbx: layout::PVH_START_INFO_GPA,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            },
            Self::Linux64 { entry } => kvm_regs {
                rip: entry,
                rsi: layout::ZERO_PAGE_GPA,
                rsp: layout::BOOT_STACK_GPA,
                rbp: layout::BOOT_STACK_GPA,
                rflags: RFLAGS_RESERVED,
                ..Default::default()
            },
        }
    }

    /// Changes a vCPU's system registers, as they are after creation, to those
    /// at this entry.
    pub fn change_sregs(self, sregs: &mut kvm_sregs) {
        let long = matches!(self, Self::Linux64 { .. });
        sregs.cs = segment(BOOT_CS, TYPE_CODE, long);
        let data = segment(BOOT_DS, TYPE_DATA, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            limit: 0x67,
            type_: TYPE_TSS,
            present: 1,
            ..Default::default()
        };
        match self {
            Self::Pvh { .. } => {
                sregs.cr0 = CR0_PE | CR0_ET;
                sregs.cr4 = 0;
            }
            Self::Linux64 { .. } => {
                sregs.gdt.base = layout::GDT_GPA;
                sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.cr3 = layout::PAGE_TABLES_GPA;
                sregs.cr4 = CR4_PAE;
                sregs.efer |= EFER_LME | EFER_LMA;
            }
        }
    }
}

/// A flat segment; `long` makes it 64-bit code.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}
