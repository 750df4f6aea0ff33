#include <map>
#include <utility>

#include "catch.h"
#include "core/pieces.h"

using namespace anyflash;

namespace {

// Counts how often the pieces cover each (row, key), and checks what a Plan promises about its
// pieces.
void check_plan(const IntervalMask<int64_t>& mask, PlanFor purpose) {
  INFO("seqlen_q " << mask.seqlen_q << " seqlen_k " << mask.seqlen_k << " window ("
                   << mask.window_left << ", " << mask.window_right << ") purpose "
                   << static_cast<int>(purpose));
  const Plan plan = plan_pieces(mask, purpose);
  std::map<std::pair<int64_t, int64_t>, int> covered;
  bool ordered = true, inside = true, square = true, rows_have_keys = true, masks_as_asked = true;
  int64_t next_row = plan.row_begin;
  for (size_t n = 0; n < plan.pieces.size(); ++n) {
    const Piece& piece = plan.pieces[n];
    if (piece.merges) {
      ordered &= n > 0 && plan.pieces[n - 1].row_begin == piece.row_begin &&
                 plan.pieces[n - 1].row_end == piece.row_end;
    } else {
      ordered &= piece.row_begin == next_row;
      next_row = piece.row_end;
    }
    inside &=
        0 <= piece.key_begin && piece.key_begin < piece.key_end && piece.key_end <= mask.seqlen_k;
    square &= piece.mask != Piece::Mask::kCausal || piece.rows() == piece.keys();
    masks_as_asked &=
        purpose != PlanFor::kExplicit || (piece.mask != Piece::Mask::kCausal && !piece.merges);
    for (int64_t row = piece.row_begin; row < piece.row_end; ++row) {
      bool any = false;
      for (int64_t key = piece.key_begin; key < piece.key_end; ++key) {
        const bool sees = piece.mask == Piece::Mask::kNone ||
                          (piece.mask == Piece::Mask::kCausal &&
                           key - piece.key_begin <= row - piece.row_begin) ||
                          (piece.mask == Piece::Mask::kInterval && mask.visible(row, key));
        if (sees) ++covered[{row, key}];
        any |= sees;
      }
      rows_have_keys &= any;
    }
  }
  CHECK(ordered);
  CHECK(next_row == plan.row_end);
  CHECK(inside);
  CHECK(square);
  CHECK(masks_as_asked);
  CHECK(rows_have_keys);
  bool exact = true;
  for (int64_t row = 0; row < mask.seqlen_q; ++row) {
    for (int64_t key = 0; key < mask.seqlen_k; ++key) {
      const auto found = covered.find({row, key});
      const int times = found == covered.end() ? 0 : found->second;
      exact &= times == (mask.visible(row, key) ? 1 : 0);
    }
  }
  CHECK(exact);
}

}  // namespace

TEST_CASE("pieces cover every visible (row, key) once and nothing else", "[pieces]") {
  for (int64_t seqlen_q : {1, 2, 3, 7, 33, 70}) {
    for (int64_t seqlen_k : {1, 2, 5, 33, 34, 100}) {
      for (int64_t left : {-1, 0, 1, 6, 40}) {
        for (int64_t right : {-1, 0, 1, 5, 50}) {
          for (PlanFor purpose : {PlanFor::kForward, PlanFor::kBackward, PlanFor::kExplicit}) {
            check_plan({seqlen_q, seqlen_k, left, right}, purpose);
          }
        }
      }
    }
  }
}

TEST_CASE("long sequences are cut into chunks and merged pieces", "[pieces]") {
  for (PlanFor purpose : {PlanFor::kForward, PlanFor::kBackward, PlanFor::kExplicit}) {
    check_plan({1100, 1130, -1, 0}, purpose);
    check_plan({400, 430, -1, 0}, purpose);
    check_plan({700, 600, 200, 3}, purpose);
  }
}

TEST_CASE("common problems need no explicit mask", "[pieces]") {
  const Plan full = plan_pieces({64, 96, -1, -1}, PlanFor::kForward);
  REQUIRE(full.pieces.size() == 1);
  CHECK(full.pieces[0].mask == Piece::Mask::kNone);

  const Plan square = plan_pieces({64, 64, -1, 0}, PlanFor::kForward);
  REQUIRE(square.pieces.size() == 1);
  CHECK(square.pieces[0].mask == Piece::Mask::kCausal);

  const Plan more_keys = plan_pieces({2048, 2080, -1, 0}, PlanFor::kForward);
  REQUIRE(more_keys.pieces.size() == 2);
  CHECK(more_keys.pieces[0].mask == Piece::Mask::kNone);
  CHECK(more_keys.pieces[0].keys() == 32);
  CHECK(more_keys.pieces[1].mask == Piece::Mask::kCausal);
  CHECK(more_keys.pieces[1].merges);

  const Plan more_rows = plan_pieces({96, 64, -1, 0}, PlanFor::kForward);
  CHECK(more_rows.row_begin == 32);
  REQUIRE(more_rows.pieces.size() == 1);
  CHECK(more_rows.pieces[0].mask == Piece::Mask::kCausal);

  const Plan decode = plan_pieces({1, 4096, 100, 0}, PlanFor::kForward);
  REQUIRE(decode.pieces.size() == 1);
  CHECK(decode.pieces[0].mask == Piece::Mask::kNone);
  CHECK(decode.pieces[0].keys() == 101);
}

TEST_CASE("a window reads only the keys near it", "[pieces]") {
  int64_t work = 0;
  for (const Piece& piece : plan_pieces({4096, 4096, 128, 0}, PlanFor::kForward).pieces)
    work += piece.rows() * piece.keys();
  CHECK(work < 2 * 4096 * 129);
}

TEST_CASE("no rows or no keys need no pieces", "[pieces]") {
  CHECK(plan_pieces({0, 5, -1, 0}, PlanFor::kForward).pieces.empty());
  CHECK(plan_pieces({5, 0, -1, -1}, PlanFor::kForward).pieces.empty());
}
