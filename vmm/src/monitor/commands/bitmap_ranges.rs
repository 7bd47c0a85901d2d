//! `query-block-dirty-bitmap-ranges`: what a bitmap has set. Not QEMU's, where one asks an NBD
//! server.

use std::rc::Rc;

use serde_json::{Value, json};

use super::Outcome;
use crate::monitor::Monitor;
use crate::monitor::args::Args;
use crate::monitor::error::QmpError;

/// Ranges of one reply by default, and most.
const MAX_RANGES: (u32, u32) = (4096, 16384);

pub(super) async fn query_block_dirty_bitmap_ranges(
    monitor: Rc<Monitor>,
    mut args: Args,
) -> Outcome {
    let node = args.required_str("node")?;
    let name = args.required_str("name")?;
    let offset = args.optional_u64("offset")?.unwrap_or(0);
    let most = args.optional_u32("max-ranges")?.unwrap_or(MAX_RANGES.0);
    args.finish()?;
    if !(1..=MAX_RANGES.1).contains(&most) {
        return Err(QmpError::generic(format!(
            "Parameter 'max-ranges' expects a number from 1 to {}",
            MAX_RANGES.1
        )));
    }
    let bitmap = monitor.graph.find_bitmap(&node, &name)?;
    if bitmap.is_inconsistent() {
        return Err(QmpError::generic(format!(
            "Bitmap '{name}' is inconsistent: it does not say what was written"
        )));
    }
    let bits = bitmap.bits();
    let mut ranges: Vec<Value> = Vec::new();
    let mut at = offset;
    while ranges.len() < most as usize {
        let Some(run) = bits.next_dirty(at) else {
            at = bits.size();
            break;
        };
        // It may have begun before what was asked for.
        let start = run.start.max(offset);
        ranges.push(json!({"offset": start, "length": run.end - start}));
        at = run.end;
    }
    let mut answer = json!({
        "size": bits.size(),
        "granularity": bits.granularity(),
        "ranges": ranges,
    });
    if bits.next_dirty(at).is_some() {
        answer["next-offset"] = at.into();
    }
    Ok(answer)
}
