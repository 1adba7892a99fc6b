// Which dtypes PyTorch's DLPack carries as themselves.

#ifndef CPP_HANDLER_ROUTES_H_
#define CPP_HANDLER_ROUTES_H_

#include "shared/torch.h"

namespace bridge {

// Fills in how each dtype travels: as itself, as an integer of its width, or not at all. It tries
// them out. Needs the GIL, and all the rest of `torch`.
void ChooseRoutes(Torch& torch);

}  // namespace bridge

#endif  // CPP_HANDLER_ROUTES_H_
